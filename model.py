"""theta: a small decoder-only transformer, its attention, its KV cache, and the one hook through
which weights can be fast.

Every linear layer of a block calls `hook(name, x, y)` on its way out, if one is given, and uses
what comes back in place of y = x W^T. That is enough to record a layer's inputs and outputs, to add
the update of an inner loop (meta.py), or to patch weights (analyze.py).

Choices, each for what learned fastest here on two CPU cores: rotary positions (2104.09864:
relative, nothing to learn), LayerNorm without gains (on a CPU one kernel where RMSNorm is five),
ReLU (cheapest, and no worse), normalised queries and keys (2010.04245: bears Muon's large steps),
zero-initialised output projections (a block starts as the identity), no biases, no weight tying.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.text import IGNORE, padded
from lab.machine import eager, replayed


@dataclass
class Config:
    """The shape of a model. width must divide by heads, and width / heads by 2."""
    vocab: int
    layers: int = 4
    heads: int = 4
    width: int = 128
    ratio: int = 4                  # hidden units of the MLP / width


def norm(x):
    return F.layer_norm(x, (x.size(-1),))

def rotary(pos, dim):
    """Positions (B, T) -> cos, sin (B, T, 1, dim) of the rotation of every pair of channels
    (2104.09864, section 3.4): by the angle for one of a pair, by its negative for the other."""
    freq = 1e4 ** -(torch.arange(0, dim, 2, device=pos.device) / dim)
    angle = pos[..., None, None] * torch.cat((-freq, freq))
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin)

def attention(q, k, v, bias=None, plain=None):
    """softmax(q k^T / sqrt(D) + bias) v (Eqs. 5, 6). q (B, H, T, D), k and v (B, H, S, D), bias
    (B or 1, 1, T, S) 0 or -inf; None: causal where T = S, and a single query sees everything.

    plain=True writes the formula out, False takes the fused kernel, None chooses. Fused kernels
    have no double backward (pytorch#116350), so whoever differentiates a gradient asks for plain.
    On a CPU the fused kernel is faster by itself, but in a whole training step of short rows it is
    not, so None takes plain below 128 keys there."""
    # Not bool(...): compiled, the size is symbolic, and only a branch turns it into a bool.
    causal = True if bias is None and q.size(-2) > 1 else False
    if plain is None:
        plain = q.device.type == "cpu" and k.size(-2) < 128
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    if causal:
        unseen = torch.full((q.size(-2), k.size(-2)), -math.inf, dtype=q.dtype, device=q.device)
        bias = unseen.triu(1)
    scores = q / math.sqrt(q.size(-1)) @ k.mT
    return (scores if bias is None else scores + bias).softmax(-1) @ v


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
        self.heads, self.act = c.heads, F.relu
        self.norm1 = nn.LayerNorm(c.width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(c.width, elementwise_affine=False)
        self.qkv = Linear(f"{i}.qkv", c.width, 3 * c.width)
        self.out = Linear(f"{i}.out", c.width, c.width)
        self.up = Linear(f"{i}.up", c.width, c.ratio * c.width)
        self.down = Linear(f"{i}.down", c.ratio * c.width, c.width)

    def forward(self, x, turn, bias, cache, slot, hook, plain, detach):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x), hook).view(B, T, 3 * self.heads, -1)
        qk, v = qkv.split((2 * self.heads, self.heads), 2)
        if turn is not None:
            qk = rotate(norm(qk), *turn)
        q, k = qk.transpose(1, 2).split(self.heads, 1)      # (B, H, T, D)
        v = v.transpose(1, 2)                               # (B, H, T, D)
        if detach is not None:
            # Cuts the path from the answer to the trajectory: Eq. 8's second order, in context.
            cut = detach[:, None, :, None]
            k, v = torch.where(cut, k.detach(), k), torch.where(cut, v.detach(), v)
        if cache is not None:
            cache[0][:, :, slot], cache[1][:, :, slot] = k, v
            seen = slot.stop if bias is None else bias.size(-1)
            k, v = cache[:, :, :, :seen]                    # (B, H, S, D)
        y = attention(q, k, v, bias, plain).transpose(1, 2).reshape(B, T, C)
        x = x + self.out(y, hook)
        return x + self.down(self.act(self.up(self.norm2(x), hook)), hook)


class Model(nn.Module):
    """forward gives hidden states; logits turns those one cares for into scores. `dtype` is what it
    computes in, None being that of its weights."""
    dtype = None

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.width % c.heads or c.width // c.heads % 2:
            raise ValueError(f"width {c.width} must be an even multiple of heads {c.heads}")
        self.embed = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.head = nn.Linear(c.width, c.vocab, bias=False)
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False)
        for block in self.blocks:
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)

    def enter(self, ids, pos):
        """What goes into the first block, and the rotation of queries and keys."""
        cos, sin = rotary(pos, self.config.width // self.config.heads)
        x = self.embed(ids).to(self.dtype)
        return x, (cos.to(x.dtype), sin.to(x.dtype))

    def forward(self, ids, pos=None, mask=None, cache=None, slot=None, hook=None, plain_from=None,
                detach=None):
        """ids (B, T) -> normalised hidden states (B, T, C).

        pos (B or 1, T): positions, default 0..T-1. mask (B or 1, 1, T, S): who sees whom, default
        causal. cache: from `new_cache`; keys and values go to `slot` (a slice, default the first T;
        or, with a mask, a tensor (T,)), and the first S slots are looked at (S from mask; without
        one, up to the end of slot). hook: see above. plain_from: the first block that must survive
        a second differentiation. detach (B, T): positions whose keys and values pass no
        gradient."""
        if pos is None:
            pos = torch.arange(ids.size(1), device=ids.device)[None]
        if cache is not None and slot is None:
            slot = slice(0, ids.size(1))
        x, turn = self.enter(ids, pos)                      # (B, T, C)
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
            bias.masked_fill_(~mask, -math.inf)
        for i, block in enumerate(self.blocks):
            plain = True if plain_from is not None and i >= plain_from else None
            layer_cache = None if cache is None else cache[i]
            x = block(x, turn, bias, layer_cache, slot, hook, plain, detach)
        return self.norm(x)

    def logits(self, h):
        y = F.linear(h, self.head.weight.to(h.dtype))
        return y.float() if y.dtype == torch.bfloat16 else y

    def score(self, h, targets, tau=1.0):
        """Negative log-likelihood (nats; Eq. 2 is its exponential) of targets (B, T) from hidden
        states, at temperature tau, 0 where a target is IGNORE -> (B, T)."""
        if h.is_cuda:                               # picking the targets out would wait for the GPU
            logits = self.logits(h).flatten(0, 1) / tau
            nll = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
            return nll.view_as(targets)
        keep = targets >= 0
        logits = self.logits(h[keep]) / tau                 # (N, V): only where there is a target
        nll = F.cross_entropy(logits, targets[keep], reduction="none")
        zeros = torch.zeros(targets.shape, dtype=nll.dtype, device=nll.device)
        return zeros.masked_scatter(keep, nll)

    def nll(self, ids, targets, **kw):
        return self.score(self(ids, **kw), targets)

    def state(self):
        """What a checkpoint needs to build this model again."""
        return {"shape": asdict(self.config), "weights": self.state_dict()}

    @classmethod
    def load(cls, state):
        """The inverse of `state`. ValueError if the pieces do not fit together, before anything of
        their size is built."""
        try:
            config, weights = Config(**state["shape"]), dict(state["weights"])
            if any(type(v) is not int or v < 1 for v in asdict(config).values()):
                raise ValueError(f"the shape {config} is not made of numbers above 0")
            blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
            sizes = len(blocks), *weights["embed.weight"].shape
            if sizes != (config.layers, config.vocab, config.width):
                raise ValueError(f"{sizes} layers, tokens and channels are not those of {config}")
            if weights["blocks.0.up.weight"].shape[0] != config.ratio * config.width:
                raise ValueError(f"the hidden units are not those of {config}")
            model = cls(config)
            model.load_state_dict(weights)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            reason = str(e).splitlines()[-1].strip()
            raise ValueError(f"these are not the weights of a model of ours: {reason}") from None
        return model

    # ----------------------------------------------------------------------------- generation

    def new_cache(self, batch, length):
        """Keys and values of every block: (L, 2, B, H, length, D)."""
        c, w = self.config, self.head.weight
        shape = c.layers, 2, batch, c.heads, length, c.width // c.heads
        return torch.zeros(shape, dtype=self.dtype or w.dtype, device=w.device)

    @eager
    @torch.inference_mode()
    def generate(self, prompts, stop, max_new=96, temperature=0.0, top_k=0, top_p=1.0,
                 generator=None, pad=0, hook=None, static=None):
        """Continues every prompt (lists of ids, any lengths) until `stop` -> list of lists of new
        ids, without `stop`.

        temperature 0 is greedy; top_k and top_p (1904.09751) cut the tail first. static: shapes
        that never change; default on CUDA for more than 8 tokens, where one graph then replays
        every token."""
        device, B = self.head.weight.device, len(prompts)
        if not B or not min(map(len, prompts)):
            raise ValueError("generate needs at least one prompt, and none of them empty")
        if static is None:
            static = device.type == "cuda" and max_new > 8
        stream = Stream(self, prompts, max_new, stop, pad, hook)
        logits, step = stream.begin(), None if static else stream.growing
        done = torch.zeros(B, dtype=torch.bool, device=device)
        for i in range(max_new):
            new = sample(logits, temperature, top_k, top_p, generator)
            stream.out[:, i] = torch.where(done, stop, new)
            done = done | (new == stop)
            # The host asks a GPU whether all are done every 8 tokens only.
            ask = device.type == "cpu" or i % 8 == 7
            if i + 1 == max_new or ask and bool(done.all()):
                break
            if step is None:                        # only now a real token stands in `out`
                step = replayed(stream.fixed, torch.zeros(1, dtype=torch.int64, device=device))
            logits = step(i)
        rows = stream.out.tolist()
        return [row[:row.index(stop)] if stop in row else row for row in rows]


class Stream:
    """Prompts and what is written behind them, B rows side by side, over one KV cache.

    Prompts are padded on the left, so that all rows write the same slot of the cache."""

    def __init__(self, model, prompts, max_new, stop, pad, hook):
        device = model.head.weight.device
        self.model, self.hook = model, hook
        self.ids = padded(prompts, pad, device, left=True)              # (B, T)
        B, self.T = self.ids.shape
        begin = torch.tensor([[self.T - len(p)] for p in prompts], device=device)
        self.at = torch.arange(self.T + max_new, device=device)         # slots of the cache
        self.pos = (self.at - begin).clamp(min=0)                       # (B, T + max_new)
        ragged = min(map(len, prompts)) < self.T
        self.real = (self.at >= begin)[:, None, None] if ragged else None   # no padding
        self.cache = model.new_cache(B, self.T + max_new)
        self.out = torch.full((B, max_new), stop, device=device)

    def begin(self):
        """Logits behind the prompts (B, V)."""
        T = self.T
        mask = (self.at[:T, None] >= self.at[:T])[None, None]
        if self.real is not None:                   # padding sees padding: nothing would be 0 / 0
            mask = mask & (self.real[..., :T] | ~self.real[..., :T].mT)
        h = self.model(self.ids, self.pos[:, :T], mask, self.cache, hook=self.hook)
        return self.model.logits(h[:, -1])

    def growing(self, i):
        """Logits behind new token i, looking at the slots so far."""
        S = self.T + i + 1
        mask = None if self.real is None else self.real[..., :S]
        ids, pos = self.out[:, i:i + 1], self.pos[:, S - 1:S]
        h = self.model(ids, pos, mask, self.cache, slice(S - 1, S), self.hook)
        return self.model.logits(h[:, 0])

    def fixed(self, i):
        """The same, i being a tensor (1,): looks at all slots, hiding those to come."""
        mask = (self.at <= self.T + i)[None, None, None]
        if self.real is not None:
            mask = mask & self.real
        ids, pos = self.out[:, i], self.pos[:, self.T + i]
        h = self.model(ids, pos, mask, self.cache, self.T + i, self.hook)
        return self.model.logits(h[:, 0])


def sample(logits, temperature=0.0, top_k=0, top_p=1.0, generator=None):
    """One id a row from logits (B, V); temperature 0 takes the largest. No device sync."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k and top_k < logits.size(-1):
        lowest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p * (p.cumsum(-1) - p < top_p)          # until the mass before a token reaches top_p
        p = torch.zeros_like(p).scatter(-1, order, p)
    # The largest of p over exponentials is a draw from p; torch.multinomial would sync.
    race = p / torch.empty_like(p).exponential_(generator=generator)
    return race.argmax(-1)
