"""The command ``sttp gan``: options as typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import shared_options as shared
from sttp_manifold.experiments.options import numbers, rates, words
from sttp_manifold.experiments.terminal import ending

__all__ = ["gan"]


def gan(
    task: Annotated[
        str,
        typer.Option(
            help="gan-fashion-mnist-16, -28 or -32, gan-cifar10, gan-stl10; or gan-hf:NAME@SIZE, "
            "any image set of Hugging Face at 16, 28, 32 or 48 pixels."
        ),
    ] = "gan-fashion-mnist-16",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Names or wildcards of discriminators, parted by commas; see `sttp methods`. "
            "\\[ten of them]"
        ),
    ] = None,
    ranks: Annotated[
        list[str] | None, typer.Option(help="Ranks of the spectral weights. \\[16]")
    ] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="Seeds, as in 0-2. \\[0,1,2]")] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="small, for two cores; or published: widths 256 and 128, 5 steps of the "
            "discriminator, 50,000 of the generator, bfloat16, for a GPU. Given options win."
        ),
    ] = "small",
    steps: Annotated[
        int | None, typer.Option(help="Steps of the generator. \\[1500]", show_default=False)
    ] = None,
    discriminator_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the discriminator for each of the generator. \\[1]", show_default=False
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="Real images, and generated ones, in a step. \\[64]", show_default=False),
    ] = None,
    ngf: Annotated[
        int | None, typer.Option(help="Width of the generator. \\[16]", show_default=False)
    ] = None,
    ndf: Annotated[
        int | None, typer.Option(help="Width of the discriminator. \\[16]", show_default=False)
    ] = None,
    latent: Annotated[
        int | None,
        typer.Option(help="Numbers that an image is made from. \\[128]", show_default=False),
    ] = None,
    generator_lr: Annotated[
        float | None,
        typer.Option(help="Rate of the generator's Adam. \\[0.001]", show_default=False),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            help="Decay of the averaged generator, whose images are judged. \\[0.995]",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        int | None, typer.Option(help="Steps between two looks. \\[250]", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Images that are judged. \\[2560]", show_default=False)
    ] = None,
    classifier_epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of the classifier whose features are compared. \\[2]", show_default=False
        ),
    ] = None,
    fid: Annotated[
        bool,
        typer.Option(
            "--fid", help="FID, KID and Inception Score too, by torch-fidelity and its weights."
        ),
    ] = False,
    amp: Annotated[
        str | None,
        typer.Option(help="Mixed precision: bfloat16. \\[none]", show_default=False),
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
    """Train GANs."""
    from sttp_manifold.experiments.carry_out import carry_out
    from sttp_manifold.experiments.distributed import processes
    from sttp_manifold.experiments.files import file_name
    from sttp_manifold.experiments.gan.entrants import DEFAULT
    from sttp_manifold.experiments.gan.published import inception_weights
    from sttp_manifold.experiments.gan.setting import PRESETS
    from sttp_manifold.experiments.plan import Settings
    from sttp_manifold.experiments.shards import Shard

    with ending("Stopped. What is done is kept; the same command goes on from here."):
        if preset not in PRESETS:
            raise ConfigError(f"--preset {preset!r}: expected one of {', '.join(PRESETS)}")
        if fid:
            inception_weights()
        if processes() > 1:
            raise ConfigError(
                f"sttp gan was started in {processes()} processes, as by torchrun: a GAN trains in "
                "one; start it without, and let --jobs, --shard or --dask do several runs at a time"
            )
        given = {
            "steps": steps,
            "discriminator_steps": discriminator_steps,
            "batch_size": batch,
            "ngf": ngf,
            "ndf": ndf,
            "latent": latent,
            "generator_lr": generator_lr,
            "ema": ema,
            "every": every,
            "samples": samples,
            "classifier_epochs": classifier_epochs,
            "fid": fid or None,
            "amp": amp,
        }
        options: dict[str, Any] = dict(PRESETS[preset])
        options.update({name: value for name, value in given.items() if value is not None})
        settings = Settings(
            task=task,
            methods=words(DEFAULT if methods is None else methods),
            ranks=numbers(ranks, "--ranks"),
            seeds=numbers(seeds, "--seeds"),
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
            options=options,
        )
        records = carry_out(settings, tune=tune, quiet=quiet)
    shared.leave(records)
