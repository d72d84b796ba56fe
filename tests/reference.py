"""An independent model and independent decoders: transformers' Ministral3, no cache, the whole text
recomputed at every forward.

The decoders are written after the published descriptions, one list at a time, and know nothing of
trimode's runtime.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Ministral3Config, Ministral3ForCausalLM


class Reference:
    """Logits of a text whose first tokens are causal and whose last ``block`` tokens see each
    other.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        values = json.loads((checkpoint / "config.json").read_text())
        self.mask_token_id: int = values["mask_token_id"]
        self.eos_token_id: int = values["eos_token_id"]
        names = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "max_position_embeddings",
            "tie_word_embeddings",
        )
        # No query scale is the same as a scale of beta 0.
        rope = values["rope_parameters"] or {
            "rope_type": "default",
            "rope_theta": values["rope_theta"],
            "llama_4_scaling_beta": 0.0,
            "original_max_position_embeddings": 1024,
        }
        config = Ministral3Config(
            **{n: values[n] for n in names},
            rope_parameters=rope,
            sliding_window=None,
            pad_token_id=None,
        )
        config._attn_implementation = "eager"
        weights: dict[str, Tensor] = {}
        for file in checkpoint.glob("model*.safetensors"):
            weights.update(load_file(file))
        self.model = Ministral3ForCausalLM(config).to(dtype).eval()
        renamed = {
            n.replace("encoder.", "model.").replace("diffusion_head", "lm_head"): t.to(dtype)
            for n, t in weights.items()
        }
        self.model.load_state_dict(renamed, strict=True)
        self.dtype = dtype
        self.least_margin = float("inf")
        self._rows = 0  # last rows on which the drafter acts
        adapter = checkpoint / "linear_spec_lora"
        self.has_drafter = adapter.is_dir()
        if self.has_drafter:
            self._hook_drafter(adapter)

    def logits(self, tokens: list[int], block: int = 0, drafter: bool = False) -> Tensor:
        """(n, V). The last ``block`` rows see everything, the others what precedes them."""
        n = len(tokens)
        sees = torch.ones(n, n, dtype=torch.bool).tril()
        sees[n - block :] = True
        return self._run(
            tokens, sees, torch.arange(n), block if drafter and self.has_drafter else 0
        )

    def quadratic_logits(self, tokens: list[int], draft: list[int]) -> Tensor:
        """(k, k + 1, V). Row r is [draft r, k masks], at positions n + r, n + r + 1, ...; it sees
        ``tokens``, the first of each row up to its own, and, in its masks, all of itself.
        """
        n, k = len(tokens), len(draft)
        text = tokens + [t for d in draft for t in [d] + [self.mask_token_id] * k]
        positions = list(range(n)) + [n + r + c for r in range(k) for c in range(k + 1)]
        sees = torch.zeros(len(text), len(text), dtype=torch.bool)
        sees[:n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
        sees[n:, :n] = True
        for r in range(k):
            row = slice(n + r * (k + 1), n + (r + 1) * (k + 1))
            for earlier in range(r + 1):
                sees[row, n + earlier * (k + 1)] = True
            sees[row.start + 1 : row.stop, row] = True
        return self._run(text, sees, torch.tensor(positions), 0)[n:].unflatten(0, (k, k + 1))

    def _run(self, tokens: list[int], sees: Tensor, positions: Tensor, drafter_rows: int) -> Tensor:
        mask = torch.zeros(sees.shape, dtype=self.dtype).masked_fill(
            ~sees, torch.finfo(self.dtype).min
        )[None, None]
        self._rows = drafter_rows
        with torch.no_grad():
            out = self.model(
                input_ids=torch.tensor([tokens]),
                attention_mask=mask,
                position_ids=positions[None],
                use_cache=False,
            )
        return out.logits[0]

    def pick(self, row: Tensor) -> int:
        """Greedy token; remembers how close the closest decision was."""
        best = row.topk(2).values
        self.least_margin = min(self.least_margin, float(best[0] - best[1]))
        return int(row.argmax())

    def _hook_drafter(self, adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        lora = load_file(adapter / "adapter_model.safetensors")
        for i, layer in enumerate(self.model.model.layers):
            prefix = f"base_model.model.encoder.layers.{i}.self_attn.o_proj.lora_"
            delta = (
                (config["lora_alpha"] / config["r"])
                * lora[prefix + "B.weight"]
                @ lora[prefix + "A.weight"]
            )
            layer.self_attn.o_proj.register_forward_hook(self._add(delta.to(self.dtype)))

    def _add(self, delta: Tensor) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if self._rows == 0:
                return output
            added = inputs[0][:, -self._rows :] @ delta.T
            return torch.cat((output[:, : -self._rows], output[:, -self._rows :] + added), 1)

        return hook


def ar(model: Reference, prompt: list[int], max_new: int) -> tuple[list[int], int]:
    out: list[int] = []
    while len(out) < max_new:
        out.append(model.pick(model.logits(prompt + out)[-1]))
        if out[-1] == model.eos_token_id:
            break
    return out, len(out)


def diffusion(
    model: Reference, prompt: list[int], max_new: int, length: int, threshold: float
) -> tuple[list[int], int]:
    mask, eos = model.mask_token_id, model.eos_token_id
    out: list[int] = []
    nfe = 0
    seed = model.pick(model.logits(prompt)[-1])
    for _ in range(-(-max_new // length)):
        block = [seed] + [mask] * (length - 1)
        for _ in range(length):
            if mask not in block:
                break
            nfe += 1
            _fill(
                model, block, model.logits(prompt + out + block, block=length)[-length:], threshold
            )
            if eos in block and mask not in block[: block.index(eos)]:
                break
        out += block
        nfe += 1
        seed = model.pick(model.logits(prompt + out)[-1])
        if eos in out:
            out = out[: out.index(eos) + 1]
            break
    return out[:max_new], nfe


def linear_spec(
    model: Reference, prompt: list[int], max_new: int, length: int, threshold: float, drafter: bool
) -> tuple[list[int], int]:
    mask, eos = model.mask_token_id, model.eos_token_id
    nfe = 1
    out = [model.pick(model.logits(prompt)[-1])]
    while len(out) < max_new and out[-1] != eos:
        block = [out[-1]] + [mask] * (length - 1)
        # A model that keeps choosing the mask token for a slot would never finish drafting; one
        # forward a slot is the most that can help.
        for _ in range(max(1, length - 1)):
            nfe += 1
            drafts = block[1:]
            logits = model.logits(prompt + out[:-1] + block, block=length, drafter=drafter)[
                -length:
            ]
            if threshold == 0:
                drafts = [int(row.argmax()) for row in logits[1:]]
            elif mask in drafts:
                _fill(model, drafts, logits[1:], threshold)
            block[1:] = drafts
            if threshold == 0 or mask not in drafts:
                break
        nfe += 1
        greedy = [model.pick(row) for row in model.logits(prompt + out[:-1] + block)[-length:]]
        accepted = 0
        while accepted < length - 1 and greedy[accepted] == block[accepted + 1]:
            accepted += 1
        out += greedy[: accepted + 1]
        if eos in out:
            out = out[: out.index(eos) + 1]
    return out[:max_new], nfe


def quadratic_spec(
    model: Reference, prompt: list[int], max_new: int, length: int
) -> tuple[list[int], int, list[int]]:
    """Tokens, forwards, and what each cycle emitted."""
    start = model.logits(prompt + [model.mask_token_id] * length, block=length)
    nfe = 1
    draft = [int(row.argmax()) for row in start[-length:]]
    draft[0] = model.pick(start[len(prompt) - 1])
    out: list[int] = []
    cycles: list[int] = []
    while len(out) < max_new:
        nfe += 1
        logits = model.quadratic_logits(prompt + out, draft)
        logits[:, 1] = logits[:, 0]
        predicted = logits.argmax(-1)
        accepted = 1
        while accepted < length and predicted[accepted - 1, 0] == draft[accepted]:
            accepted += 1
        model.pick(logits[accepted - 1, 0])
        emitted = draft[:accepted]
        if model.eos_token_id in emitted:
            emitted = emitted[: emitted.index(model.eos_token_id) + 1]
        out += emitted
        cycles.append(len(emitted))
        if out[-1] == model.eos_token_id:
            break
        draft = predicted[accepted - 1, 1:].tolist()
    return out[:max_new], nfe, cycles


def _fill(model: Reference, block: list[int], logits: Tensor, threshold: float) -> None:
    """Commit the most probable masked slot and every other one that reaches the threshold."""
    probabilities, ids = logits.softmax(-1).max(-1)
    masked = [i for i, token in enumerate(block) if token == model.mask_token_id]
    masked.sort(key=lambda i: -float(probabilities[i]))
    for rank, i in enumerate(masked):
        if rank == 0 or float(probabilities[i]) >= threshold:
            block[i] = int(ids[i])
