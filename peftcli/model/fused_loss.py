"""Log-probabilities of the tokens that are trained, and of no others, with each product of the head made once.

TRL's fused head computes the logits a second time in the backward pass, which its GPU kernels make worth while,
and without those kernels it scores the tokens of the prompt too. Here the gradient of a token is made beside its
log-probability while its logits are there, and kept: it is as wide as the hidden state.
"""

import functools
from contextlib import nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from peftcli.data.tokenize import IGNORED
from peftcli.errors import MachineError
from peftcli.model.distributed import without_gradients
from peftcli.model.oom import free_memory, is_out_of_memory
from peftcli.plan.memory.training_setup import tile_rows

TRITON_DEVICE = "cuda"
"""Of the devices on which TRL computes its loss by kernels of Triton."""
TRL_OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What TRL's trainer asks its fused head for."""
CHECKED_TOKENS, CHECKED_WIDTH, CHECKED_VOCABULARY = 20, 64, 2500
"""Of the check of TRL's loss: TRL's kernels take 1024 words of the vocabulary at a time."""
CHECK_TOLERANCE = 0.05
"""Of the largest value; products of 16-bit numbers differ by less than a hundredth."""


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

    The head must be a frozen linear layer whose outputs are the logits, which a few tokens prove.
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
    """Whether only a frozen linear layer is between the hidden states and the logits."""
    text = model.config.get_text_config()
    if getattr(text, "final_logit_softcapping", None) is not None or getattr(text, "output_router_logits", False):
        return False
    head: Any = model.get_output_embeddings()
    # Neither one with an adapter around it, nor one in 4 bits, nor a part of one.
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    return not any(one.requires_grad for one in head.parameters())


@without_gradients
def _gives_log_probs(model: PreTrainedModel) -> bool:
    """Whether this head and the model's own agree: one that scales its logits, say, is no linear layer alone."""
    was_training = model.training
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = ((torch.arange(9, device=model.get_input_embeddings().weight.device) * 7 + 3) % vocabulary)[None]
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    finally:
        model.train(was_training)
    wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    narrow = next(model.parameters()).dtype != torch.float32
    return bool((found - wanted).abs().max() <= (0.1 if narrow else 1e-3) * logits.std())


def replace_broken_loss(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> tuple[str, bool] | None:
    """Check TRL's fused loss on a GPU, and put another one in its place where it fails.

    Triton compiles its kernels on this machine, which needs a C compiler and a GPU that this Triton knows.

    Args:
        model: that TRL gave a fused head.
        dtype: of its weights.

    Returns:
        How TRL's loss failed, and whether the one of this module is used now; else it is TRL's without Triton. None
        where nothing failed.

    Raises:
        MachineError: TRL's loss fails without Triton too, and the one of this module does not fit the model.
    """
    problem = trl_loss_problem(device, dtype) if device.type == TRITON_DEVICE else None
    if problem is None:
        return None
    disable_triton()
    if score_targets(model):
        return problem, True
    if (rest := trl_loss_problem(device, dtype)) is not None:
        raise MachineError(
            f"TRL's loss fails on this GPU with Triton ({problem}) and without it ({rest}); run `peftcli doctor`, and "
            "install the torch and trl that it names as tested"
        )
    return problem, False


def disable_triton() -> None:
    """Let TRL compute losses by torch alone in this process, as it does on devices without Triton."""
    for module in (trl.kernels.chunked_logprob, trl.trainer.utils):
        module._use_triton = lambda device: False
    trl.trainer.utils._supports_trl_loss_kernel = lambda *given: False


def trl_loss_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """How TRL's fused loss fails to give the values and gradients of ours; None where it gives them."""
    said = ""
    for _ in range(2):
        try:
            # Triton compiles for the device that is current.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return _trl_difference(device, dtype)
        # Triton has errors of its own, and what a compiler that is missing raises is the operating system's.
        except Exception as problem:
            said = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
            if not is_out_of_memory(problem):
                return said
        # Outside the handler, which keeps the tensors of the attempt alive.
        free_memory()
    return said


class _HeadAlone(nn.Module):
    """What TRL's fused head needs of a model: hidden states, which are given here, and an output layer."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        self.hidden = hidden.detach().requires_grad_()
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(weight, requires_grad=False)

    def base_model(self, **given: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, **given: Any) -> Tensor:
        logits: Tensor = self.head(self.hidden)
        return logits


def _trl_difference(device: torch.device, dtype: torch.dtype) -> str | None:
    """What differs between TRL's loss in some dtype and ours in float32; None where nothing does."""
    drawn = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, CHECKED_TOKENS, CHECKED_WIDTH), generator=drawn).to(device, dtype)
    weight = (torch.randn((CHECKED_VOCABULARY, CHECKED_WIDTH), generator=drawn) / 4).to(device, dtype)
    labels = torch.randint(0, CHECKED_VOCABULARY, (1, CHECKED_TOKENS), generator=drawn)
    labels[:, : CHECKED_TOKENS // 4] = IGNORED
    theirs, ours = _HeadAlone(hidden, weight), _HeadAlone(hidden.float(), weight.float())
    add_fused_lm_head(theirs, outputs=TRL_OUTPUTS)
    found = theirs(labels=labels.to(device), fused_lm_head=True)
    wanted = _scored(ours, (), {"labels": labels.to(device)})
    found.loss.backward()
    wanted.loss.backward()
    pairs: tuple[tuple[str, Any, Any], ...] = (
        ("log-probabilities", found.log_probs, wanted.log_probs),
        ("entropies", found.entropy, wanted.entropy),
        ("gradients", theirs.hidden.grad, ours.hidden.grad),
    )
    for name, one, other in pairs:
        if not (one.float() - other).abs().max() <= CHECK_TOLERANCE * other.abs().max():  # NaN too
            return f"its {name} differ from those of the same tokens in float32"
    return None
