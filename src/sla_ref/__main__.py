"""`python -m sla_ref` is `sla-ref`."""

from .cli import main

if __name__ == "__main__":
    main()
