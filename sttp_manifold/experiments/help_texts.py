"""What ``sttp --help`` teaches, and what its commands say of themselves."""

from __future__ import annotations

import re

__all__ = ["COMPARE", "GAN", "PAPER", "TEACH"]


def _flow(text: str) -> str:
    """Join the lines of paragraphs, so that the terminal breaks them; indented lines stay."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)


TEACH = _flow("""Compare ways of training W = U diag(s) V^T.

A weight matrix W is written as U diag(s) V^T: two matrices with orthonormal columns, and the
singular values between them. Keeping r of them is what rank r means.

[bold]dense[/bold] is the ordinary weight. [bold]svdp[/bold] keeps U and V as two tall matrices.
[bold]sttp[/bold] writes each as a tensor train, a chain of small cores: fewer numbers, fewer
matrices within reach.

[bold]chart[/bold] methods make orthonormal matrices from free numbers by Householder reflections,
and use Adam or SGD as they are. [bold]riemannian[/bold] methods keep the orthonormal matrices
themselves and step along their manifold.

[bold]Solvers[/bold] are for the completion tasks: they find a weight from some of its entries, on
the manifold of fixed rank, on the redundant product, in a chart, or with plain factors, and are
judged by what it takes them to get to a residual of 1e-10.

Start with [bold]sttp compare[/bold]: two minutes on two cores, no download.
""")

COMPARE = _flow("""Run methods x ranks x seeds of a task; write records, tables, figures, a report.

All methods of one rank and seed start from one weight and see the data in one order. Each method's
learning rate comes from one grid, judged on a validation split (--tune) and kept with the task; the
grid grows where the best rate is its first or last. The test split is looked at once a run, at its
end.

Solvers (see `sttp methods`) stop at the task's target, or when their budget of calls of the cost
function is spent; what it took them is a table and a figure of its own.

Stopped half-way and started again with the same options, it goes on where it was.

[bold]Examples[/bold]

  sttp compare                     every method on digits, ranks 4 and 8
  sttp compare --methods 'sttp-*,dense-adam' --ranks 2,4,8 --seeds 0-4
  sttp compare --task completion --out runs/completion
  sttp compare --task completion-tensor --ranks 4 --seeds 0
  sttp compare --task completion-matrix --methods 'fixed-rank-*,product-cg'
  sttp compare --task fashion-mnist --epochs 5 --device cuda
  sttp compare --task fashion-mnist --model wrn-10-2 --ranks 4,8,16,32
  sttp compare --task cifar10 --model wrn-28-10 --amp bfloat16
  sttp compare --task cifar10 --start pretrained --epochs 20
  sttp compare --shard 3/16 --out runs/all   one of sixteen jobs
  sttp compare --dask tcp://host:8786        on the workers of a cluster
  torchrun --nproc-per-node 4 -m sttp_manifold compare --device cuda
  sttp compare --lr 0.01 --lr dense-sgd=0.1
  sttp compare --tune              choose learning rates first

[bold]What is written to --out[/bold]

  records.jsonl      one line a run: specification, curves, spectra
  summary.csv, .md   the table; .md also says who beats whom, and by how much
  figures/*.png      frontier, curves, spectra, drift, size, convergence
  report.html        all of it on one page that needs no other file
  tensorboard/       a log a run, with --tensorboard

[bold]Exit codes[/bold]

  0    every run is on record; one that diverged is a result, and said
  1    a run failed with an error (tried again next time), or none was ok
  2    a wrong name, option or value; data, a folder or a disk that is not
       there, not readable, not writable or full; a worker that was killed
  130  interrupted or terminated; the same command goes on from here
""")

GAN = _flow("""Train SNGAN with discriminators of several kinds, and watch their spectra.

Hinge loss, Adam (0, 0.9), rates linear to zero, the generator averaged over its steps. The weights
of the discriminator are plain, spectrally normalized (also in a network as small as STTP's),
penalized for not being orthogonal, or SVDP and STTP with a spectrum that is kept: by charts, or on
the manifold by Riemannian Adam and Muon. Points have a rate of their own, 15 times that of biases.

Images are judged by distances of features of a small classifier, which the command trains on the
task's labels and keeps in the folder sttp-manifold of the user's cache, or in that of the variable
STTP_CACHE. They are no FID; --fid adds that where torch-fidelity and its weights are there.

Stopped half-way, even within a run, and started again with the same options, it goes on where it
was.

[bold]Examples[/bold]

  sttp gan                         ten discriminators, three seeds, 16 x 16 pixels
  sttp gan --methods 'spectral-norm,sttp-identity-*' --seeds 0
  sttp gan --tune                  choose the rates first, on seeds of their own
  sttp gan --task gan-cifar10 --preset published --device cuda --ranks 64
  sttp gan --task gan-hf:my/images@32 --data-dir my-images

[bold]What is written to --out[/bold]

  as by sttp compare; and products/HASH/ of each run: samples.png,
  interpolation.png, and generator.pt, the averaged generator
""")

PAPER = _flow("""Recompute the counts of the paper's experiments.

Degrees of freedom and compression ratio Z of the paper's networks, by SVDP and STTP, with identity
and learned spectrum, beside the figures that are known as published. Plans only: no weight is made,
no data is needed.

DOF counts the numbers of the charts of all weights; Z is the percentage of the dense network's
numbers that DOF and all biases and norms come to. Where no figure is beside a count, none is known.

[bold]Examples[/bold]

  sttp paper
  sttp paper --networks wrn-28-10,resnet-32 --ranks 4,16,64
  sttp paper --format csv --out counts.csv

[bold]Exit codes[/bold]

  0    every known published figure comes out, or none is among the counts
  1    one does not
  2    a wrong name, option or value
""")
