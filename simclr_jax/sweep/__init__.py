"""Top-1 against the fraction of labels: sizes x fractions x seeds, resumable.

  python -m simclr_jax.sweep --recipe=digits --workdir=DIR
      [--sizes=18x0.125,18x0.25] [--labels=1,10,100] [--seeds=0,1,2]
      [--methods=scratch,linear,finetune,self_distill,distill] [--task=I/N]
      [--claims] [--config.FIELD=VALUE] [--pretrain.FIELD=VALUE] ...

Every cell of the grid is an ordinary run in a folder of DIR, and its command is
printed. The same command again continues what was stopped, tries again what
failed and repeats nothing. It can be started any number of times at once, on
machines that share DIR: a cell belongs to the process that holds its lock,
which the system takes back should the process die. --task=I/N divides the grid
without locks instead, for file systems that have none. DIR is not in a bucket.

--config.FIELD sets a field of all runs, --pretrain.FIELD, --finetune.FIELD and
--distill.FIELD one of a stage's. Networks are distilled into the first size.
DIR/label_efficiency.{csv,png,svg} hold the result, DIR/report.html shows it.

--claims runs what SimCLRv2 compares instead: networks of two sizes, heads of 3,
2 and 1 layers, where fine-tuning starts, what is distilled and on which images.
DIR/claims.{csv,md} have the gains over the seeds; DIR may be that of a grid.

Exit codes: 0 done, 1 some cell failed (its folder has error.txt), 2 the user's
mistake.
"""
