"""`FusedCispoTrainer`: TRL's GRPOTrainer with the CISPO loss of fst_kernels. One file, to import or to copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType, is_peft_model
from trl import GRPOTrainer

from fst_kernels import linear_policy_loss, linear_token_logprobs

WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class FusedCispoTrainer(GRPOTrainer):
    """`GRPOTrainer(args=GRPOConfig(loss_type="cispo", ...))` whose LM head runs in fst_kernels.

    For text models, all weights or LoRA of the layers, in one process or several (DDP).

    One pass gives the loss and its gradients. Settings that need log-probs before the loss is known (beta, sequence
    ratios, top_entropy_quantile, off_policy_mask_threshold, adaptive entropy) go through TRL's own formulas on our
    log-probs, for one more product with the head. Logits are fp32 also under bf16, where TRL rounds them to bf16.
    Raises ValueError on settings it does not reproduce.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for model in (self.model, self.ref_model):
            if model is not None:
                _lend_states(_inner(model))
        if refusal := self._refusal():
            raise ValueError(f"FusedCispoTrainer {refusal}")

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if self._needs_logprobs_first():
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)  # (B, T)
        tokens = mask.sum().clamp(min=1)
        advantages = inputs["advantages"].view(len(mask), -1)  # (B, 1) or (B, T)
        slopes = advantages
        if self.use_vllm and self.vllm_importance_sampling_correction:
            slopes = slopes * inputs["importance_sampling_ratio"]
        # num_items_in_batch counts a whole generation; the loss of one optimizer step is a mean over that step's tokens
        mode, micro_batches, share = "eval", 1, 1.0
        if self.model.training:
            mode, micro_batches = "train", self.current_gradient_accumulation_steps
            share = micro_batches / self.args.steps_per_generation
        # gradients are averaged over processes, and the tokens are counted over all of them
        denominator = inputs["num_items_in_batch"].clamp(min=1) * share / self.accelerator.num_processes
        bonus = self.entropy_coef / micro_batches  # of the micro-batch's mean entropy, whatever the denominator
        old = inputs.get("old_per_token_logps")  # none: the policy has not moved since it sampled, ρ = 1

        def loss_of(*head: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
            out = linear_policy_loss(
                *head,
                torch.zeros_like(mask.flatten(), dtype=torch.float32) if old is None else old.flatten(),
                slopes.expand_as(mask).flatten(),
                mask.flatten(),
                kind="reinforce" if old is None else "cispo",
                weight_max=self.epsilon_high,
                entropy_coef=float(bonus * denominator / tokens) if bonus else 0.0,
                denominator=denominator,
                **options,
            )
            return out.loss, out.logprobs, out.metrics["entropy_mean"]

        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        loss, logprobs, entropy = self._with_head(model, ids, seen, mask.shape[1], loss_of)

        log_ratio = logprobs.new_zeros(mask.shape) if old is None else logprobs.view_as(old) - old
        clipped = (log_ratio.exp() > self.epsilon_high) & (advantages > 0)  # TRL counts no others
        sums = torch.stack([entropy * mask.sum(), (clipped * mask).sum(), mask.sum()])
        entropies, clips, everywhere = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics[mode]
        metrics["entropy"].append(entropies / max(1.0, everywhere))
        metrics["cispo_clip_ratio"].append(clips / max(1.0, everywhere))
        if self._entropy_bonus_enabled:
            policy_loss = loss.detach() + bonus * entropy
            metrics["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
            if mode == "train" and self.accelerator.sync_gradients:
                metrics["entropy_coef"].append(self.entropy_coef)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,  # never: the models that have one are refused
        **images: Any,  # all None: likewise
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probs (B, logits_to_keep), and entropies if asked for; 0 at padding. Replaces TRL's chunked head."""

        def logprobs_of(*head: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
            out = linear_token_logprobs(*head, entropy=compute_entropy, **options)
            return (out.logprobs, out.entropy) if compute_entropy else (out.logprobs,)

        parts = []
        for ids, seen in zip(*(x.split(batch_size or len(x)) for x in (input_ids, attention_mask)), strict=True):
            part = self._with_head(model, ids, seen, logits_to_keep, logprobs_of)
            parts.append([x.view(len(ids), -1) for x in part])
        padding = attention_mask[:, -logits_to_keep:] == 0
        logprobs, *entropies = (torch.cat(x).masked_fill(padding, 0) for x in zip(*parts, strict=True))
        return logprobs, entropies[0] if entropies else None, None

    def _with_head(
        self,
        model: Any,
        ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_length: int,
        use: Callable[..., tuple[torch.Tensor, ...]],
    ) -> tuple[torch.Tensor, ...]:
        """What `use` makes of hidden [N,H], weight [V,H], targets [N] of the completions' N tokens, and of the options
        of the logits: tensors. It is called inside of the model's forward, where DDP prepares the backward pass."""

        def head(lm: Any, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            hidden = states[:, -completion_length - 1 : -1].flatten(0, 1)  # a token is predicted by the state before it
            out, softcap = lm.get_output_embeddings(), getattr(lm.config, "final_logit_softcapping", None)
            targets = ids[:, -completion_length:].flatten()
            with torch.autocast(hidden.device.type, enabled=False):
                return use(hidden, out.weight, targets, bias=out.bias, softcap=softcap, temperature=self.temperature)

        with self.accelerator.autocast():
            return model(input_ids=ids, attention_mask=attention_mask, head=head)

    def _needs_logprobs_first(self) -> bool:
        return (
            self.beta != 0
            or self.importance_sampling_level != "token"
            or self.top_entropy_quantile < 1
            or self.off_policy_mask_threshold is not None
            or self.use_adaptive_entropy
        )

    def _refusal(self) -> str | None:
        if self.loss_type != "cispo":
            return f'computes loss_type="cispo", got {self.loss_type!r}: use GRPOTrainer for it'
        if self.epsilon_high < 1:
            return (
                f"got epsilon_high={self.epsilon_high}, in cispo the cap of the ratio itself, so that no token would "
                "weigh more than that: set it to 1 or more (ScaleRL uses 5)"
            )
        if (kind := self.accelerator.distributed_type) not in WHOLE:
            return f"takes models that are whole on every process (DDP), got {kind.value}"
        if self._is_vlm or self.aux_loss_enabled:
            return "takes plain text models: not multimodal, and MoE with router_aux_loss_coef=0 only"
        if type(_inner(self.model).get_output_embeddings()) is not torch.nn.Linear or self._has_prompt_tuning():
            return "takes PEFT that leaves the head and the prompt alone: LoRA of the layers"
        if self.args.cast_lm_head_to_fp32:
            return "computes fp32 logits from weights of any dtype: leave cast_lm_head_to_fp32 off"
        if not self._head_is_linear():
            return f"needs logits = softcap(hidden @ lm_head + bias), which {type(self.model).__name__}'s are not"
        return None

    def _has_prompt_tuning(self) -> bool:
        return is_peft_model(self.model) and any(c.is_prompt_learning for c in self.model.peft_config.values())

    @torch.no_grad()
    def _head_is_linear(self) -> bool:
        """Some architectures scale their logits in ways that the kernels do not know: compare a few."""
        self.model.eval()  # no dropout
        ids = torch.arange(8, device=self.model.device)[None] % self.model.config.vocab_size
        logits = self.model(input_ids=ids).logits[:, :-1].flatten(0, 1).float() / self.temperature
        found = self._get_per_token_logps_and_entropies(self.model, ids, torch.ones_like(ids), 7)[0]
        expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).view(1, -1)
        exact = self.model.dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        return torch.allclose(found, expected, rtol=1e-3 if exact else 0.1, atol=1e-3 if exact else 0.1)


def _inner(model: Any) -> Any:
    """The transformers model inside of PEFT."""
    return model.get_base_model() if is_peft_model(model) else model


def _lend_states(lm: Any) -> None:
    """Let `lm(..., head=f)` return f(lm, its last hidden states [B,T,H]) instead of logits."""
    usual = lm.forward

    @functools.wraps(usual)  # generate looks at the signature
    def forward(*args: Any, head: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if head is None:
            return usual(*args, **kwargs)
        of_states = {name: kwargs[name] for name in ("input_ids", "attention_mask")}  # PEFT adds others, all None
        return head(lm, lm.base_model(**of_states, use_cache=False).last_hidden_state)

    lm.forward = forward
