"""Training of an embedding network on one process or many, which goes on where it was killed.

    python -m deepsim_ext.examples.train --data digits --out runs/a
    torchrun --nproc-per-node 2 -m deepsim_ext.examples.train --data photos/ --out runs/b --tensorboard

Each step takes a batch of `--classes` classes with `--samples` images each, shared among the processes, and
the loss of the whole batch. Some images of each class are held out; every epoch ends with a search for the
nearest of them. The folder `--out` holds

    settings.json   what decides the curve, and a fingerprint of the data
    log.jsonl       a record of each step: loss, statistics of its triplets or pairs, learning rate, speed;
                    and of each evaluation
    tensorboard/    the same, with --tensorboard
    checkpoints/    the last two, by torch.distributed.checkpoint
    network.pt      what was learnt, once training is through

and has to be one that all processes see. A checkpoint has its name only when all of it is on the disk: a run
can be killed at any time. A first Ctrl-C or SIGTERM, to any of the processes, stops all of them after the
step, with a checkpoint; a second one does not wait. The same command with `--resume` goes on from the last
checkpoint, or starts if there is none; what was logged after the checkpoint is logged again. Everything
random is drawn from the seed and the number of the step. So on the CPU the losses are those of a run that was
never interrupted, bit for bit, for the same number of processes and threads. With another number of
processes, batches, images and learning rates are the same, and the losses up to rounding. Networks have
GroupNorm, not BatchNorm, for that: an embedding does not depend on what else a process has to embed.

Needs the extra `deepsim-ext[train]`.
"""
