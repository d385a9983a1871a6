"""The lab: a small video diffusion transformer on real handwritten digits, to try SLA on.

Needs the extra `lab` (`pip install 'sla-ref[lab]'`). One file, one job:

- `data`      moving digits, made on the fly from a seed
- `arms`      the kinds of attention a model can be built with
- `model`     a small version of Wan's transformer
- `flow`      rectified flow: noising, the loss, the sampler
- `config`    the options of a training run
- `train`     one training loop for teacher and fine-tuning, resumable without loss
- `layers`    each layer matched to full attention: stage 1 of SLA2's router
- `graph`     a step of it as a CUDA graph
- `checkpoint`  what such a run goes on from, checked
- `distributed`  several processes, as the training loop sees them
- `evaluate`  held-out loss, distance to the teacher, cost of attention
- `weights`   weight files that know when they are damaged
- `figures`   the pictures
- `runs`      what `sla-ref train-teacher` and `sla-ref finetune` run
- `demo`      what `sla-ref demo` runs
- `console`, `machine`: progress bars, hardware and versions
"""
