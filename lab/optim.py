"""Muon for the matrices inside the blocks, AdamW for the rest, and the schedule of their rates."""
import torch


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, then the nearest (semi-)orthogonal matrix by five
    Newton-Schulz steps.

    torch.optim.Muon does the same one matrix at a time, and always in bfloat16, which many a CPU
    emulates. This one takes all matrices of a shape at once."""

    def __init__(self, params, lr=0.02, momentum=0.85, dtype=None):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.dtype = dtype                          # of the Newton-Schulz steps, None: the weights'

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for shape in dict.fromkeys(p.shape for p in with_grad):
                params = [p for p in with_grad if p.shape == shape]
                self.move(params, group["lr"], group["momentum"])

    def move(self, params, lr, momentum):
        """One step of all parameters of one shape (rows, columns)."""
        directions = []
        for p in params:
            m = self.state[p].setdefault("momentum", torch.zeros_like(p))
            m.lerp_(p.grad, 1 - momentum)
            directions.append(p.grad.lerp(m, momentum))     # Nesterov
        x = torch.stack(directions).to(self.dtype or params[0].dtype)   # (N, rows, columns)
        rows, columns = params[0].shape
        x = self.orthogonal(x.mT).mT if rows > columns else self.orthogonal(x)
        scale = lr * max(1, rows / columns) ** 0.5
        for p, u in zip(params, x):
            p.sub_(u, alpha=scale)

    @staticmethod
    def orthogonal(x):
        """(N, R, C), R <= C -> about U V^T of every x = U S V^T."""
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x


def matrices_inside(model):
    """Parameters of a model -> (matrices of its blocks, everything else)."""
    inside = {p: n.startswith("blocks.") and p.ndim == 2 for n, p in model.named_parameters()}
    return [p for p, yes in inside.items() if yes], [p for p, yes in inside.items() if not yes]

def adamw(params, lr, fused):
    return torch.optim.AdamW(params, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

def optimisers(model, lr, lr_adam, dtype=None):
    """[Muon for the matrices of the blocks, AdamW for embedding and head]."""
    hidden, rest = matrices_inside(model)
    return [Muon(hidden, lr, dtype=dtype), adamw(rest, lr_adam, model.head.weight.is_cuda)]

def linear(c, i):
    """The rates' share at step i: warm-up, then level, then linearly to 0."""
    return min(1, (i + 1) / max(1, c.warmup), (c.steps - i) / max(1, c.decay * c.steps))
