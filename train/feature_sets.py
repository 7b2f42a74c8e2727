"""Whether a set of frame features may stand in for its videos: for a run, and for every tool that evaluates one."""

from __future__ import annotations

from model.video import VideoModel
from pipelines.features import check_image_model
from pipelines.shards import ShardSet
from train.config import Config


def check_feature_set(shards: ShardSet, model: VideoModel, config: Config) -> None:
    """ValueError, naming both sides, where the set holds features that are not what this model makes of frames; a set
    of videos passes. What options it allows, `ClipLoader` checks (`pipelines.features.check_options`).

    Call it before the model's precision is changed.
    """
    if shards.features is None:
        return
    if config.speed.cache_gb:
        raise ValueError(
            f"speed.cache_gb = {config.speed.cache_gb:g} keeps what the frozen image model makes of frames, which "
            f"{shards.folder} already holds; leave it out"
        )
    source = model.feature_source
    if source is None:
        raise ValueError(
            f"method {config.model.method} needs the frames themselves, and {shards.folder} holds features that "
            f"{shards.features.model} made of them: name the set of videos in data.shards, or a method that reads of a "
            'frame one vector alone (model.method = "prompt_clip")'
        )
    check_image_model(shards.features, config.model.name, source, shards.folder)
