"""SLA in other people's models and with other people's names.

- `diffusers`    SLA in a Wan transformer of diffusers; needs the extra `diffusers`
- `sdpa`         SLA where a model of your own calls `F.scaled_dot_product_attention`
- `ulysses`      tokens split between several GPUs
- `checkpoints`  the added weights: saved, loaded, and read under the names that other projects gave them; the files
                 themselves are read by `checkpoint_files`
- `thu_ml`       the layer as users of the authors' code, thu-ml/SLA, know it

Each is imported by its name; `import sla_ref` loads none of them.
"""
