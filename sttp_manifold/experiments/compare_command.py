"""The command ``sttp compare``: options as typed, and what is shown of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sttp_manifold.experiments import shared_options as shared
from sttp_manifold.experiments.options import numbers, rates, words
from sttp_manifold.experiments.terminal import ending

__all__ = ["compare"]


def compare(
    task: Annotated[
        str,
        typer.Option(
            help="digits, fashion-mnist, cifar10, stl10, completion, completion-tensor or "
            "completion-matrix; hf:NAME\\[@SIZE], an image set of Hugging Face; see `sttp tasks`."
        ),
    ] = "digits",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Names or wildcards, parted by commas; see `sttp methods`. "
            "\\[all that apply to the task]"
        ),
    ] = None,
    ranks: Annotated[
        list[str] | None, typer.Option(help="Ranks, as in 4,8 or 2-4. \\[the task's]")
    ] = None,
    seeds: Annotated[
        list[str] | None, typer.Option(help="Seeds, as in 0,1,2 or 0-2. \\[the task's]")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs to train. \\[the task's]", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Network of a task of images: resnet-D or wrn-D-K, as in wrn-28-10. "
            "\\[the task's]",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples in a step. \\[the task's]", show_default=False)
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Learning rate: cosine or linear, to zero, or constant. \\[cosine]",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Initial weights: common (one of the rank for all methods), own (the draw, "
            "projected on each method's set) or pretrained (a dense network, truncated by each "
            "method; dense goes on from it). \\[common]",
            show_default=False,
        ),
    ] = None,
    pretrain_epochs: Annotated[
        int | None,
        typer.Option(help="Of that dense network. \\[--epochs]", show_default=False),
    ] = None,
    pretrain_lr: Annotated[
        float | None,
        typer.Option(help="Its learning rate, by Adam. \\[0.001]", show_default=False),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(
            help="crop-flip: move images by up to 4 pixels and mirror them. \\[no]",
            show_default=False,
        ),
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option(
            help="Mixed precision: bfloat16 or float16, for activations. \\[no]",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Average images down to so many pixels. \\[as they are]", show_default=False
        ),
    ] = None,
    train_examples: Annotated[
        int | None,
        typer.Option(
            help="Train on the first so many examples of the split, the same for all methods and "
            "seeds. \\[all]",
            show_default=False,
        ),
    ] = None,
    val_examples: Annotated[
        int | None,
        typer.Option(
            help="Validate on the first so many examples of the split. \\[all]",
            show_default=False,
        ),
    ] = None,
    max_evaluations: Annotated[
        int | None,
        typer.Option(
            help="Solvers: calls of the cost function, at most. \\[the task's]", show_default=False
        ),
    ] = None,
    max_iterations: Annotated[
        int | None,
        typer.Option(help="Solvers: iterations, at most. \\[no limit]", show_default=False),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            help="Solvers: seconds, at most, looked at after each iteration; where it ends a run, "
            "its numbers depend on the machine. \\[no limit]",
            show_default=False,
        ),
    ] = None,
    lr: shared.Rates = None,
    tune: shared.Tune = False,
    tuning_seeds: shared.TuningSeeds = None,
    extensions: shared.Extensions = None,
    tuned_file: shared.TunedFile = None,
    device: shared.Device = "auto",
    dtype: shared.Dtype = None,
    out: shared.Out = None,
    jobs: shared.Jobs = None,
    shard: shared.ShardOf = None,
    dask: shared.Dask = None,
    tensorboard: shared.TensorBoard = False,
    data_dir: shared.DataDir = None,
    quiet: shared.Quiet = False,
) -> None:
    """Run a comparison."""
    from sttp_manifold.experiments.carry_out import carry_out
    from sttp_manifold.experiments.distributed import is_first, joined
    from sttp_manifold.experiments.files import file_name
    from sttp_manifold.experiments.plan import Settings
    from sttp_manifold.experiments.shards import Shard

    stopped = "Stopped. What is done is kept; the same command goes on from here."
    with ending(stopped), joined():
        quiet = quiet or not is_first()
        settings = Settings(
            task=task,
            methods=words(["all"] if methods is None else methods),
            ranks=numbers(ranks, "--ranks"),
            seeds=numbers(seeds, "--seeds"),
            epochs=epochs,
            max_iterations=max_iterations,
            max_evaluations=max_evaluations,
            max_seconds=max_seconds,
            lrs=rates(lr),
            device=device,
            dtype=dtype,
            jobs=jobs,
            out=out or Path("runs") / file_name(task),
            data_dir=data_dir,
            tuned_file=tuned_file,
            shard=None if shard is None else Shard.parse(shard),
            dask=dask,
            tensorboard=tensorboard,
            **shared.tuning(tune, tuning_seeds, extensions),
            options=_given(
                model=model,
                batch_size=batch_size,
                schedule=schedule,
                start=start,
                pretrain_epochs=pretrain_epochs,
                pretrain_lr=pretrain_lr,
                augment=augment,
                amp=amp,
                image_size=image_size,
                train_examples=train_examples,
                val_examples=val_examples,
            ),
        )
        records = carry_out(settings, tune=tune, quiet=quiet)
    shared.leave(records)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
