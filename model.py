"""theta: a small decoder-only transformer, its attention, its KV cache, and the one hook through which weights can be fast.

Every linear layer calls `hook(name, x, y)` on its way out, if one is given, and uses what comes back in place of y = x W^T. That is
enough to record a layer's inputs and outputs, to add the update of an inner loop (meta.py), or to patch weights (analyze.py).

Choices, each for what learned fastest here on two CPU cores: rotary positions (2104.09864: relative, nothing to learn), LayerNorm without
gains (on a CPU one kernel where RMSNorm is five), ReLU (cheapest, and no worse), normalised queries and keys (2010.04245: bears Muon's large
steps), zero-initialised output projections (a block starts as the identity), no biases, no weight tying.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """The shape of a model. width must divide by heads, and width / heads by 2."""
    vocab: int
    layers: int = 4
    heads: int = 4
    width: int = 128
    ratio: int = 4                                                          # hidden units of the MLP / width
    gpt2: bool = False                                                      # GPT-2's block instead of ours, for comparison
    context: int = 256                                                      # gpt2: positions there are


def norm(x):
    return F.layer_norm(x, (x.size(-1),))

def rotary(pos, dim):
    """Positions (B, T) -> cos, sin (B, T, 1, dim) of the rotation of every pair of channels (2104.09864, section 3.4): by the angle for
    one of a pair, by its negative for the other."""
    freq = 1e4 ** -(torch.arange(0, dim, 2, device=pos.device) / dim)
    angle = pos[..., None, None] * torch.cat((-freq, freq))
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)                                                   # not x.roll, whose compiled backward is slow on a CPU
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin).type_as(x)

def attention(q, k, v, bias=None, plain=None):
    """softmax(q k^T / sqrt(D) + bias) v. q (B, H, T, D), k and v (B, H, S, D), bias (B or 1, 1, T, S) 0 or -inf; None: causal where
    T = S, and a single query sees everything.

    plain=True writes the formula out, False takes the fused kernel, None chooses. Fused kernels have no double backward
    (pytorch#116350), so whoever differentiates a gradient asks for plain. On a CPU the fused kernel is 1.8 times as fast by itself at 64 keys, and
    4.3 at 1024; but in a whole training step of short rows neither wins, compiled blocks are faster with plain, and so None takes plain below 128."""
    if plain is None:
        plain = q.device.type == "cpu" and k.size(-2) < 128
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None and q.size(-2) > 1)
    if bias is None and q.size(-2) > 1:
        bias = torch.full((q.size(-2), k.size(-2)), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = q / math.sqrt(q.size(-1)) @ k.mT
    return (scores if bias is None else scores + bias).softmax(-1) @ v


class Linear(nn.Linear):
    """y = x W^T without a bias, and the hook."""
    def __init__(self, name, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)
        self.name = name

    def forward(self, x, hook=None):
        y = super().forward(x)
        return y if hook is None else hook(self.name, x, y)


class Block(nn.Module):
    def __init__(self, c, i):
        super().__init__()
        self.heads, self.act = c.heads, F.gelu if c.gpt2 else F.relu
        self.norm1, self.norm2 = (nn.LayerNorm(c.width, elementwise_affine=c.gpt2, bias=False) for _ in range(2))
        self.qkv = Linear(f"{i}.qkv", c.width, 3 * c.width)
        self.out = Linear(f"{i}.out", c.width, c.width)
        self.up = Linear(f"{i}.up", c.width, c.ratio * c.width)
        self.down = Linear(f"{i}.down", c.ratio * c.width, c.width)

    def forward(self, x, turn, bias, cache, slot, hook, plain, detach):     # x (B, T, C)
        B, T, C = x.shape
        qk, v = self.qkv(self.norm1(x), hook).view(B, T, 3 * self.heads, -1).split((2 * self.heads, self.heads), 2)
        q, k = (qk if turn is None else rotate(norm(qk), *turn)).transpose(1, 2).split(self.heads, 1)
        v = v.transpose(1, 2)                                               # q, k, v (B, H, T, D)
        if detach is not None:                                              # cut the path answer -> trajectory (Eq. 8's second order)
            k, v = (torch.where(detach[:, None, :, None], a.detach(), a) for a in (k, v))
        if cache is not None:
            cache[0][:, :, slot], cache[1][:, :, slot] = k, v
            k, v = cache[:, :, :, :slot.stop if bias is None else bias.size(-1)]
        y = attention(q, k, v, bias, plain)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C), hook)
        return x + self.down(self.act(self.up(self.norm2(x), hook)), hook)


class Model(nn.Module):
    """forward gives hidden states; logits turns those one cares for into scores."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.width % c.heads or c.width // c.heads % 2:
            raise ValueError(f"width {c.width} must be an even multiple of heads {c.heads}")
        self.embed = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        self.norm = nn.LayerNorm(c.width, elementwise_affine=c.gpt2, bias=False)
        if c.gpt2:
            self.place, self.head.weight = nn.Embedding(c.context, c.width), self.embed.weight
            for p in self.parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=0.02)
        for b in self.blocks:
            for layer in (b.out, b.down):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * c.layers)) if c.gpt2 else nn.init.zeros_(layer.weight)

    def forward(self, ids, pos=None, mask=None, cache=None, slot=None, hook=None, plain_from=None, detach=None):
        """ids (B, T) -> normalised hidden states (B, T, C).

        pos (B or 1, T): positions, default 0..T-1. mask (B or 1, 1, T, S): who sees whom, default causal.
        cache: from `new_cache`; keys and values go to `slot` (a slice, default the first T; or, with a mask, a tensor (T,)) and the first S
        slots are looked at (S from mask; without one, up to the end of slot).
        hook: see above. plain_from: the first block that must survive a second differentiation. detach (B, T): positions whose
        keys and values pass no gradient."""
        if pos is None:
            pos = torch.arange(ids.size(1), device=ids.device)[None]
        x, c = self.embed(ids), self.config
        slot = slice(0, ids.size(1)) if cache is not None and slot is None else slot
        x, turn = (x + self.place(pos), None) if c.gpt2 else (x, rotary(pos, c.width // c.heads))
        bias = None if mask is None else torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill_(~mask, -math.inf)
        for i, block in enumerate(self.blocks):
            plain = True if plain_from is not None and i >= plain_from else None
            x = block(x, turn, bias, None if cache is None else cache[i], slot, hook, plain, detach)
        return self.norm(x)

    def logits(self, h):
        return self.head(h).float() if h.dtype == torch.bfloat16 else self.head(h)

    def score(self, h, targets, tau=1.0):
        """Negative log-likelihood (nats) of targets (B, T) from hidden states, at temperature tau, 0 where a target is negative -> (B, T).

        Logits only where there is a target."""
        keep = targets >= 0
        nll = F.cross_entropy(self.logits(h[keep]) / tau, targets[keep], reduction="none")           # (N,)
        return torch.zeros(targets.shape, dtype=nll.dtype, device=nll.device).masked_scatter(keep, nll)

    def nll(self, ids, targets, **kw):
        return self.score(self(ids, **kw), targets)

    def compile_blocks(self):
        """torch.compile for every block: a CPU's SFT step takes 0.8 of the time, after some 20 s of compiling, and needs a C++ compiler."""
        torch._functorch.config.recompute_views = True                      # or ReLU's sign is stored as bytes, which was slow on AVX2
        for b in self.blocks:
            b.compile(dynamic=True)

    def new_cache(self, batch, length):
        """Keys and values of every block: (L, 2, B, H, length, D)."""
        c, w = self.config, self.head.weight
        return torch.zeros(c.layers, 2, batch, c.heads, length, c.width // c.heads, dtype=w.dtype, device=w.device)

    @torch.compiler.set_stance("force_eager")                               # shapes change with every token: compiling again costs more
    @torch.inference_mode()
    def generate(self, prompts, stop, max_new=96, temperature=0.0, top_k=0, top_p=1.0, generator=None, pad=0, hook=None, static=None):
        """Continues every prompt (lists of ids, any lengths) until `stop` -> list of lists of new ids, without `stop`. (The cache makes 48
        tokens for 64 prompts 9 times as fast on a CPU.)

        temperature 0 is greedy; top_k and top_p (1904.09751) cut the tail first. Prompts are padded on the left, so that all rows
        write the same slot of the cache. The host asks the device whether all are done every 8 tokens only. static: shapes that never
        change, default on CUDA, where one graph then replays every token."""
        device, B = self.head.weight.device, len(prompts)
        if not B or not min(map(len, prompts)):
            raise ValueError("generate needs at least one prompt, and none of them empty")
        T = max(map(len, prompts))
        ids = torch.tensor([[pad] * (T - len(p)) + p for p in prompts], device=device)
        begin = torch.tensor([T - len(p) for p in prompts], device=device)[:, None]                  # a row's first slot that is no padding
        at = torch.arange(T + max_new, device=device)
        pos, seen = (at - begin).clamp(min=0), (at >= begin)[:, None, None] if min(map(len, prompts)) < T else None
        cache, mask = self.new_cache(B, T + max_new), (at[:T, None] >= at[:T])[None, None]
        if seen is not None:                                                # padding sees padding: nothing at all would be 0 / 0
            mask = mask & (seen[..., :T] | ~seen[..., :T].mT)
        logits = self.logits(self(ids, pos[:, :T], mask, cache, hook=hook)[:, -1])                   # (B, V)
        out, done = torch.full((B, max_new), stop, device=device), torch.zeros(B, dtype=torch.bool, device=device)
        def step(i):
            S = T + i + 1
            return self.logits(self(out[:, i:i + 1], pos[:, S - 1:S], None if seen is None else seen[..., :S], cache, slice(S - 1, S), hook)[:, 0])
        def any_step(i):                                                    # the same, i being a tensor (1,)
            visible = (at <= T + i)[None, None, None]
            h = self(out[:, i], pos[:, T + i], visible if seen is None else visible & seen, cache, T + i, hook)
            return self.logits(h[:, 0])
        if static or static is None and device.type == "cuda":
            step = replayed(any_step, torch.zeros(1, dtype=torch.int64, device=device))
        for i in range(max_new):
            new = sample(logits, temperature, top_k, top_p, generator)
            out[:, i] = torch.where(done, stop, new)
            done = done | (new == stop)
            if i + 1 == max_new or (i % 8 == 7 or device.type == "cpu") and bool(done.all()):
                break
            logits = step(i)
        rows = out.tolist()
        return [r[:r.index(stop)] if stop in r else r for r in rows]

    def state(self):
        """What a checkpoint needs to build this model again."""
        return {"shape": asdict(self.config), "weights": self.state_dict()}

    @classmethod
    def load(cls, state):
        """The inverse of `state`. ValueError if the pieces do not fit together."""
        try:
            model = cls(Config(**state["shape"]))
            model.load_state_dict(state["weights"])
        except (KeyError, TypeError, RuntimeError) as e:
            raise ValueError(f"these are not the weights of a model of ours: {str(e).splitlines()[0]}") from None
        return model


def replayed(f, i):
    """f(i), i a tensor (1,) -> g(n) for int n, on CUDA as a replay of one graph: a launch instead of some two hundred."""
    if not i.is_cuda:
        return lambda n: f(i.fill_(n))
    side = torch.cuda.Stream()                                              # a graph wants what it records to have run before, elsewhere
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = f(i)
    def g(n):
        i.fill_(n)
        graph.replay()
        return result
    return g

def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """One id a row from logits (B, V); temperature 0 takes the largest. No device sync."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p * (p.cumsum(-1) - p < top_p)                                  # keep until the mass before a token reaches top_p
        p = torch.zeros_like(p).scatter(-1, order, p)
    race = p / torch.empty_like(p).exponential_(generator=generator)        # the largest is a draw from p; multinomial would sync
    return race.argmax(-1)
