"""Log-probabilities of the tokens that are trained, and of no others, with each product of the head made once.

TRL's fused head computes the logits a second time in the backward pass, which its kernels on a card make worth while,
and without those kernels it scores the tokens of the prompt too. Here the gradient of a token is made beside its
log-probability while its logits are there, and kept: it is as wide as the hidden state.
"""

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from peftcli.data.tokenize import IGNORED
from peftcli.model.distributed import without_gradients
from peftcli.plan.memory.training_setup import tile_rows


class _Scores(torch.autograd.Function):
    """Log-probability of each target, entropy, and whether the target is the likeliest token.

    The gradient of `log p(y)` with respect to the hidden state is `W[y] - sum_v p(v) W[v]`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            hidden: (tokens, width).
            weight: (vocabulary, width); frozen, as the bias.
            bias: (vocabulary,), or None.
            targets: (tokens,), int64.

        Returns:
            Three times (tokens,): float32, float32 and bool; only the first has a gradient.
        """
        wanted = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if wanted else None
        log_probs, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        is_top = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        rows = tile_rows(len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            target = targets[part, None]
            logits = functional.linear(hidden[part], weight, bias).float()
            highest, token = logits.max(-1, keepdim=True)
            is_top[part] = token[:, 0] == targets[part]
            likely = logits.sub_(highest).exp()
            total = likely.sum(-1, keepdim=True)
            likely.div_(total)
            logged = total.log()[:, 0]
            log_probs[part] = logits.gather(1, target)[:, 0] - logged
            entropy[part] = logged - logits.mul_(likely).sum(-1)
            if slope is not None:
                likely.scatter_add_(1, target, likely.new_full((), -1.0).expand_as(target))
                slope[part] = likely.neg_().to(weight.dtype) @ weight
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy, is_top)
        return log_probs, entropy, is_top

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Each token's gradient times what arrives for its log-probability, (tokens,)."""
        (slope,) = ctx.saved_tensors
        return slope * gradients[0][:, None].to(slope.dtype), None, None, None


def score_targets(model: PreTrainedModel) -> bool:
    """Let a model that TRL gave a fused head score its trained tokens with this one; False where it cannot be.

    The head must be a frozen linear layer on a processor whose outputs are the logits, which a few tokens prove.
    """
    if not _is_linear(model):
        return False
    fused = model.forward

    # `generate` and PEFT ask for the signature of the class.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **given: Any) -> Any:
        if not fused_lm_head:
            return fused(*args, **given)
        if given.get("labels") is None or not _is_linear(self):
            return fused(*args, fused_lm_head=True, **given)
        return _scored(self, args, given)

    model.forward = MethodType(forward, model)
    if _gives_log_probs(model):
        return True
    model.forward = fused
    return False


def _scored(model: PreTrainedModel, args: tuple[Any, ...], given: dict[str, Any]) -> FusedCausalLMOutput:
    """What TRL's fused head returns of some inputs: position t predicts token t + 1."""
    labels: Tensor = given.pop("labels")[:, 1:]
    count = given.pop("num_items_in_batch", None)
    hidden: Tensor = model.base_model(*args, **{**given, "use_cache": False}).last_hidden_state[:, :-1]
    mask = labels != IGNORED
    places = mask.flatten().nonzero()[:, 0]
    head: Any = model.get_output_embeddings()
    # What a row says of its prompt is nobody's to learn.
    taken = hidden.flatten(0, 1).index_select(0, places)
    found = _Scores.apply(  # type: ignore[no-untyped-call]  # torch
        taken, head.weight, head.bias, labels.flatten().index_select(0, places)
    )
    log_probs, entropy, is_top = (one.new_zeros(mask.shape).masked_scatter(mask, one) for one in found)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if count is None else count)
    return FusedCausalLMOutput(loss=loss, log_probs=log_probs, entropy=entropy, is_top1=is_top, label_mask=mask)


def _is_linear(model: PreTrainedModel) -> bool:
    """Whether nothing but a frozen linear layer on a processor stands between the hidden states and the logits."""
    text = model.config.get_text_config()
    if getattr(text, "final_logit_softcapping", None) is not None or getattr(text, "output_router_logits", False):
        return False
    head: Any = model.get_output_embeddings()
    # Neither one with an adapter around it, nor one in 4 bits, nor a part of one.
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    frozen = not any(one.requires_grad for one in head.parameters())
    return frozen and bool(head.weight.device.type == "cpu")


@without_gradients
def _gives_log_probs(model: PreTrainedModel) -> bool:
    """Whether this head and the model's own agree: one that scales its logits, say, is no linear layer alone."""
    was_training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = ((torch.arange(9) * 7 + 3) % vocabulary)[None]
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    finally:
        model.train(was_training)
    wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    narrow = next(model.parameters()).dtype != torch.float32
    return bool((found - wanted).abs().max() <= (0.1 if narrow else 1e-3) * logits.std())
