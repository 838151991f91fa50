"""theta: a small decoder-only transformer, its attention, its KV cache, and the one hook through
which weights can be fast.

Every linear layer of a block calls `hook(name, x, y)` on its way out, if one is given, and uses
what comes back in place of y = x W^T. That is enough to record a layer's inputs and outputs, to add
the update of an inner loop (meta.py), or to patch weights (analyze.py).

Choices, each for what learned best here on two CPU cores: no positions (2305.19466), but the
embedding of the token before beside a token's own, which tells the order as well and lets longer
questions come into reach; LayerNorm without gains (on a CPU one
kernel where RMSNorm is five), ReLU, normalised queries and keys (2010.04245: bears Muon's large
steps), zero-initialised output projections (a block starts as the identity), no biases, no weight
tying.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.text import END_THINK, IGNORE, PAD, padded


@dataclass
class Config:
    """The shape of a model. width must divide by heads."""
    vocab: int
    layers: int = 4
    heads: int = 3
    width: int = 96
    ratio: int = 4                  # hidden units of the MLP / width


def norm(x: torch.Tensor) -> torch.Tensor:
    """Brings the last dimension to mean 0 and variance 1."""
    return F.layer_norm(x, (x.size(-1),))

def fused(q, k, v, bias=None):
    """Attention by torch's kernel, which never writes the (T, S) weights to memory."""
    causal = bias is None and q.size(-2) > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)

def weights(q, k, bias=None):
    """softmax(q k^T / sqrt(D) + bias), written out -> (B, H, T, S)."""
    T, S = q.size(-2), k.size(-2)
    scores = q / math.sqrt(q.size(-1)) @ k.mT
    if bias is None and T > 1:
        bias = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    return (scores if bias is None else scores + bias).softmax(-1)


class Attention(torch.autograd.Function):
    """Fused attention that can be differentiated as often as one likes.

    MAML differentiates a gradient, so the backward pass of attention needs a derivative itself. No
    fused kernel has one (pytorch#116350): its backward is a kernel too, which autograd cannot look
    into, and nobody wrote the third. But the forward can stay fused. Here it saves q, k and v, and
    the backward pass is computed from them in ordinary operations, which autograd does
    differentiate. With P = softmax(q k^T / sqrt(D)) and g the gradient at P v:

        dv = P^T g    dP = g v^T    dS = P * (dP - rowsum(P * dP)), at the scores
        dq = dS k / sqrt(D)         dk = dS^T q / sqrt(D)"""
    @staticmethod
    def forward(ctx, q, k, v, bias=None):
        ctx.save_for_backward(q, k, v, bias)
        return fused(q, k, v, bias)

    @staticmethod
    def backward(ctx, g):
        q, k, v, bias = ctx.saved_tensors
        # Without create_graph, as in first-order training, nothing is recorded here. Then the
        # kernel's own backward is better. It needs what its forward would have kept: run it again.
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                y = fused(*inputs, bias)
            return *torch.autograd.grad(y, inputs, g), None
        P = weights(q, k, bias)                                 # (B, H, T, S)
        dP = g @ v.mT
        dS = P * (dP - (P * dP).sum(-1, keepdim=True)) / math.sqrt(q.size(-1))
        return dS @ k, dS.mT @ q, P.mT @ g, None


def attention(q, k, v, bias=None):
    """Computes softmax(q k^T / sqrt(D) + bias) v (Eqs. 5, 6). q (B, H, T, D), k and v (B, H, S, D),
    bias (B or 1, 1, T, S) 0 or -inf. Without a bias it is causal where T = S, and a single query
    sees everything; other shapes would mean two things, and are refused (AssertionError)."""
    T, S = q.size(-2), k.size(-2)
    assert bias is not None or T in (1, S), f"{T} queries over {S} keys need a mask"
    if not q.is_cuda and S < 128:       # short rows on a CPU: plain autograd is faster
        return weights(q, k, bias) @ v
    return Attention.apply(q, k, v, bias)

def backend_of(dtype, mask: bool, causal: bool, capability: tuple) -> str:
    """Names the kernel that torch runs for attention on a GPU of this compute capability, cuDNN's
    being switched off (lab/run.py).

        type        capability   causal, or all keys   a mask
        bfloat16    8.0 and up   flash                 efficient
        bfloat16    below        math                  math
        float16     8.0 and up   flash                 efficient
        float16     below        efficient             efficient
        float32     any          efficient             efficient
        float64     any          math                  math

    math writes the (T, S) weights out, and takes what efficient refuses: heads whose width is no
    multiple of 8 (float32: of 4)."""
    assert not (mask and causal), "torch wants one or the other"
    half, new = dtype in (torch.bfloat16, torch.float16), capability >= (8, 0)
    if dtype == torch.float64 or dtype == torch.bfloat16 and not new:
        return "math"
    return "flash" if half and new and not mask else "efficient"


class Linear(nn.Linear):
    """y = x W^T without a bias, in the type of x, and the hook."""
    def __init__(self, name, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)
        self.name = name

    def forward(self, x, hook=None):
        y = F.linear(x, self.weight.to(x.dtype))
        return y if hook is None else hook(self.name, x, y)


class Block(nn.Module):
    """x + attention, then x + MLP, each on the normalised residual."""
    def __init__(self, c, i):
        super().__init__()
        self.heads = c.heads
        self.qkv = Linear(f"{i}.qkv", c.width, 3 * c.width)
        self.out = Linear(f"{i}.out", c.width, c.width)
        self.up = Linear(f"{i}.up", c.width, c.ratio * c.width)
        self.down = Linear(f"{i}.down", c.ratio * c.width, c.width)

    def forward(self, x, bias, cache, hook):
        B, T, C = x.shape
        qkv = self.qkv(norm(x), hook).view(B, T, 3 * self.heads, -1).transpose(1, 2)
        qk, v = qkv.split((2 * self.heads, self.heads), 1)
        q, k = norm(qk).chunk(2, 1)                         # (B, H, T, D)
        if cache is not None:                               # keys and values so far
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
            cache[:] = k, v                                 # (B, H, S, D)
        n = 0 if bias is None else T - bias.size(-2)        # causal ones before those with a mask
        y = attention(q[:, :, n:], k, v, bias)
        if n:
            y = torch.cat((attention(q[:, :, :n], k[:, :, :n], v[:, :, :n]), y), 2)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + self.out(y, hook)
        hidden = self.up(norm(x), hook).relu()
        return x + self.down(hidden, hook)


class Model(nn.Module):
    """forward gives hidden states; logits turns those one cares for into scores. `dtype` is what it
    computes in, None being that of its weights."""
    dtype = None

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.width % c.heads:
            raise ValueError(f"width {c.width} must be a multiple of heads {c.heads}")
        self.embed = nn.Embedding(c.vocab, c.width)
        self.embed_before = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        for block in self.blocks:
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, ids, before=None, mask=None, cache=None, hook=None):
        """Reads ids (B, T) -> normalised hidden states (B, T, C).

        before (B, T): the token before each, default that on its left. mask (B or 1, 1, M, S)
        bool: whom each of the last M tokens sees; the others are causal. cache: from `new_cache`;
        keys and values are added to it, S counts them all. hook: see above."""
        if before is None:
            before = F.pad(ids[:, :-1], (1, 0), value=PAD)
        # </think> comes in the same with a trajectory and without: only attention tells it more.
        before = before.masked_fill(ids == END_THINK, PAD)
        x, bias = self.embed(ids) + self.embed_before(before), None
        x = x.to(self.dtype)                                        # (B, T, C)
        if mask is not None:
            # Kernels want every row of a mask to start at a multiple of 8: torch would copy it to
            # such places in every block.
            *shape, S = mask.shape
            bias = torch.zeros(*shape, -(-S // 8) * 8, dtype=x.dtype, device=x.device)[..., :S]
            bias.masked_fill_(~mask, -math.inf)
        for i, block in enumerate(self.blocks):
            x = block(x, bias, None if cache is None else cache[i], hook)
        return norm(x)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Scores tokens from hidden states (..., C) -> (..., V), in float32 at least."""
        y = F.linear(h, self.head.weight.to(h.dtype))
        return y.float() if y.dtype == torch.bfloat16 else y

    def score(self, h, targets, tau=1.0):
        """Gives the negative log-likelihood (nats; Eq. 2 is its exponential) of targets (B, T) from
        hidden states, at temperature tau, 0 where a target is IGNORE -> (B, T)."""
        # Not only where there is a target: that would be another shape in every batch.
        logits = self.logits(h).flatten(0, 1) / tau         # (B T, V)
        nll = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
        return nll.view_as(targets)

    def nll(self, ids, targets, **kw) -> torch.Tensor:
        """`score` of what `forward` makes of ids -> (B, T)."""
        return self.score(self(ids, **kw), targets)

    def state(self) -> dict:
        """Gives what a checkpoint needs to build this model again."""
        return {"shape": asdict(self.config), "weights": self.state_dict()}

    @classmethod
    def load(cls, state: dict):
        """Builds a model from `state`. ValueError if the pieces do not fit together."""
        try:
            with torch.device("meta"):              # nothing of a wrong shape is allocated
                model = cls(Config(**state["shape"]))
            model.load_state_dict(dict(state["weights"]), assign=True)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            reason = str(e).splitlines()[-1].strip()
            raise ValueError(f"these are not the weights of a model of ours: {reason}") from None
        return model.requires_grad_(True)

    # ----------------------------------------------------------------------------- generation

    def new_cache(self) -> list:
        """An empty cache: a list for every block."""
        return [[] for _ in self.blocks]

    @torch.inference_mode()
    def generate(self, prompts, stop, max_new=96, temperature=0.0, generator=None,
                 hook=None) -> list:
        """Continues every prompt (lists of ids, any lengths) until `stop` -> list of lists of new
        ids, without `stop`. temperature 0 is greedy. ValueError for an empty prompt.

        Prompts are padded on the left, so that all rows grow at the same end."""
        if not prompts or not min(map(len, prompts)):
            raise ValueError("generate needs at least one prompt, and none of them empty")
        ids, real = left_padded(prompts, self.device)
        before, mask, cache, out = None, left_mask(real), self.new_cache(), []
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        for i in range(max_new):
            h = self(ids, before, mask, cache, hook)
            new = sample(self.logits(h[:, -1]), temperature, generator)
            out.append(torch.where(done, stop, new))
            done = done | (new == stop)
            # The host asks a GPU whether all are done every 8 tokens only.
            if (not done.is_cuda or i % 8 == 7) and bool(done.all()):
                break
            before, ids = ids[:, -1:], out[-1][:, None]
            real = F.pad(real, (0, 1), value=True)
            mask = real[:, None, None]
        rows = torch.stack(out, 1).tolist() if out else [[] for _ in prompts]
        return [row[:row.index(stop)] if stop in row else row for row in rows]


def left_padded(rows: list, device):
    """Fills lists up on the left -> ids (B, T), and which of them are no padding (B, T) bool."""
    real = padded([[1] * len(row) for row in rows], 0, device, left=True).bool()
    return padded(rows, PAD, device, left=True), real

def left_mask(real: torch.Tensor) -> torch.Tensor:
    """The causal mask (B, 1, T, T) of rows padded on the left. Padding sees itself: a softmax over
    nothing would be 0 / 0."""
    causal = torch.ones(real.size(1), real.size(1), dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(real.size(1), dtype=torch.bool, device=real.device)
    return (causal & real[:, None] | itself)[:, None]

def sample(logits, temperature=0.0, generator=None):
    """Draws one id per row from logits (B, V); temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
