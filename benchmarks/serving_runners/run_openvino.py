"""OpenVINO GenAI: continuous batching over paged attention. ``run_openvino.py FOLDER THREADS``."""

from __future__ import annotations

import sys

import numpy as np
import openvino as ov
import openvino_genai as genai
from loop import serve


class Pipeline:
    """Holds the pipeline; its scheduler takes all prompts at once."""

    def __init__(self, folder: str, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = 1, 2048
        scheduler.enable_prefix_caching = False
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
        }
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)

    def answer(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Decode greedily; no token ends a text."""
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos, config.do_sample = True, False
        ids = [ov.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        found = self._pipeline.generate(ids, [config] * len(ids))
        return [[int(token) for token in one.m_generation_ids[0]] for one in found]


serve(Pipeline(sys.argv[1], int(sys.argv[2])).answer)
