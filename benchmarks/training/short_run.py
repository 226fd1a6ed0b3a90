"""Settings of a training that is measured at its end: one validation, one set of samples, one thread."""


def short_run(steps: int, *, batch: int, checkpoint_every: int, warmup: int) -> dict[str, str]:
    """Config keys and values, for the command line of a training.

    Args:
        batch: images a step.
        checkpoint_every, warmup: steps; at least two of warm-up are taken, as a schedule needs.
    """
    return {
        "loop.steps": str(steps), "loop.validate_every": str(steps), "loop.sample_every": str(steps),
        "loop.checkpoint_every": str(checkpoint_every), "loop.torch_threads": "1",
        "deepspeed.train_micro_batch_size_per_gpu": str(batch),
        "deepspeed.scheduler.params.warmup_num_steps": str(max(2, warmup)),
    }  # fmt: skip
