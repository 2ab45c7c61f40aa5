"""--smoke true: a run shrunk to seconds."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

from config.flags import Config
from runtime.sizes import sides

logger = logging.getLogger(__name__)


def shrunk(config: Config) -> Config:
    """Return the config with all its parts made small, if --smoke asks for it."""
    if not config.runtime.smoke:
        return config
    logger.info("smoke run: a few steps of a small network, no results")
    model, data, schedule = config.model, config.data, config.schedule
    if model.model == "auto" or model.model.startswith("hornet_"):
        name = "hornet_atto_gf" if model.model == "auto" else model.model
        kwargs = model.model_kwargs | {"base_dim": 16, "depths": [1, 1, 1, 1]}
        height, width = (min(64, side) for side in sides(model.input_size))
        model = replace(model, model=name, model_kwargs=kwargs, input_size=(height, width))
    if not data.has_path:
        folder = Path(tempfile.gettempdir()) / "hornet-smoke-digits"
        data = replace(data, data_set="digits", data_path=str(folder))
    epochs, steps = min(1, schedule.warmup_epochs), min(2, schedule.warmup_steps)
    schedule = replace(
        schedule, epochs=2, start_epoch=0, warmup_epochs=epochs, warmup_steps=steps,
        cooldown_epochs=0, decay_epochs=None,
    )  # fmt: skip
    log_dir = config.logging.log_dir and _beside(config.logging.log_dir)
    output_dir = config.checkpoint.output_dir and _beside(config.checkpoint.output_dir)
    return replace(
        config,
        model=model,
        finetune=replace(config.finetune, finetune="", freeze=""),
        distill=replace(config.distill, teacher=""),
        loss=replace(config.loss, class_weights=""),
        augment=replace(config.augment, size_schedule=()),
        data=replace(data, batch_size=2, num_workers=min(2, data.num_workers), max_images=256),
        optim=replace(config.optim, update_freq=min(2, config.optim.update_freq)),
        schedule=schedule,
        checkpoint=replace(config.checkpoint, output_dir=output_dir, resume="", auto_resume=False),
        logging=replace(config.logging, log_dir=log_dir, enable_wandb=False),
        runtime=replace(config.runtime, smoke=False),  # config.yaml is that of an ordinary run
    )


def _beside(folder: str) -> str:  # the full run must not resume the smoke run
    return f"{folder.rstrip('/')}-smoke"
