"""Where it runs: device, threads, precision, compiling, CUDA graphs, several processes.

CPU and CUDA train the same model on the same batches. What CUDA does otherwise stands here and in
`model.attention`: TF32 inside the training loop, one graph a generation, and on request bfloat16
and compiled blocks.
"""
import contextlib
import ctypes
import functools
import os
import sys

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lab.flags import fail

# Of this process; torchrun sets both.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def device_of(c):
    """Resolves --device, sets --threads, joins the other processes of a torchrun. Exits 2 with a
    line where a device is missing."""
    if RANK and WORLD == 1:
        fail("RANK is set without WORLD_SIZE: start several processes with torchrun")
    keep_freed_memory()
    if c.threads:
        torch.set_num_threads(c.threads)
    if c.device == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda, but torch finds no CUDA device")
    cuda = c.device != "cpu" and torch.cuda.is_available()
    if cuda:
        # It would build a plan for every new shape, up to a second each on Hopper and later.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if WORLD > 1 and not dist.is_initialized():
        join(cuda)
    return torch.device("cuda" if cuda else "cpu")

def join(cuda):
    """Joins the process group of a torchrun, on CUDA with a device of this process's own."""
    if not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        fail("WORLD_SIZE is set, but not by torchrun: start several processes with torchrun")
    if not cuda:
        dist.init_process_group("gloo")
        return
    local, n = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= n:
        fail(f"process {local} of this machine finds {n} CUDA devices: start at most {n} processes")
    torch.cuda.set_device(local)                    # what "cuda" means from here on
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))

def leave():
    """Ends the process group, if there is one."""
    if WORLD > 1 and dist.is_initialized():
        dist.destroy_process_group()

def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"

def keep_freed_memory():
    """glibc: keep what is freed instead of paging it in anew at every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**25)


# ------------------------------------------------------------------------------------- precision

@contextlib.contextmanager
def training_precision(device):
    """TF32 for float32 products on CUDA, inside the training loop only: an exact patch is no longer
    exact in it (analyze.py)."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("highest")

def precision_of(c, device):
    """Resolves --dtype: what training computes in, None being the weights' own float32. auto:
    bfloat16 on a CPU that multiplies in it."""
    cuda = device.type == "cuda"
    has_units = torch.cuda.get_device_capability(device) >= (8, 0) if cuda else fast_bfloat16()
    if c.dtype == "bfloat16" and cuda and not has_units:
        print(f"note: {device_name(device)} has no bfloat16 units: float32", file=sys.stderr)
        return None
    half = c.dtype == "bfloat16" or c.dtype == "auto" and has_units and not cuda
    return torch.bfloat16 if half else None

@contextlib.contextmanager
def computing_in(model, dtype):
    """A model that computes in dtype; in what it did before, afterwards."""
    before, model.dtype = model.dtype, dtype
    try:
        yield
    finally:
        model.dtype = before

def fast_bfloat16():
    """Does this CPU multiply bfloat16 matrices in hardware?"""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ----------------------------------------------------------------------------- compiling, graphs

def compile_blocks(model):
    """torch.compile for every block of a model; a line, and eager as before, where nothing can be
    compiled."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=model.head.weight.device))
    except Exception as e:                          # no compiler, an old one, no Triton: many kinds
        print(f"note: torch.compile does not work here ({type(e).__name__}): going on without",
              file=sys.stderr)
        return
    # Else ReLU's sign is stored as bytes, which is slow on AVX2.
    torch._functorch.config.recompute_views = True
    for block in model.blocks:
        block.compile(dynamic=True)

def eager(f):
    """Decorates a function whose shapes change with every token: compiling for each of them would
    cost more than it saves."""
    @functools.wraps(f)
    def call(*args, **kw):
        if "torch._dynamo" not in sys.modules:      # nothing is compiled, and it takes a second
            return f(*args, **kw)
        with torch.compiler.set_stance("force_eager"):
            return f(*args, **kw)
    return call

SIDE = []                                           # the one stream that graphs are recorded on

def replayed(f, i):
    """f(i), i a tensor (1,) -> g(n) for int n; on CUDA as a replay of one graph: a launch instead
    of some two hundred. What f reads must hold real values already."""
    if not i.is_cuda:
        return lambda n: f(i.fill_(n))
    if not SIDE:
        SIDE.append(torch.cuda.Stream())
    # A graph wants what it records to have run before, on another stream.
    SIDE[0].wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(SIDE[0]):
        f(i)
    torch.cuda.current_stream().wait_stream(SIDE[0])

    # thread_local: a thread that pins memory meanwhile must not spoil the recording.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=SIDE[0], capture_error_mode="thread_local"):
        result = f(i)

    def replay(n):
        i.fill_(n)
        graph.replay()
        return result
    return replay


# ------------------------------------------------------------------------------------- processes

def together(params, numbers):
    """Sums gradients, and numbers to log, over the processes of a torchrun. -> numbers"""
    if WORLD == 1:
        return numbers
    params = [p for p in params if p.requires_grad]
    for p in params:                                # of a process whose share was empty
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    extra = torch.tensor([float(v) for v in numbers.values()]).to(params[0])
    flat = torch.cat([*(p.grad.flatten() for p in params), extra])
    dist.all_reduce(flat)                           # one message for all of it
    *grads, extra = flat.split([*(p.numel() for p in params), len(numbers)])
    for p, g in zip(params, grads):
        p.grad.copy_(g.view_as(p))
    return dict(zip(numbers, extra.tolist()))

def lost_a_process(error):
    """Is this what a process of a torchrun sees when another one has ended?"""
    return WORLD > 1 and ("peer" in str(error) or isinstance(error, dist.DistError))


def made_ahead(batches, steps, device):
    """Items of a dataset, namedtuples of tensors, in the order of `steps`, on the device: for a GPU
    other processes make them while this one learns. A CPU that learns has no core to spare."""
    cuda = device.type == "cuda"
    workers = min(15, os.cpu_count() - 1) if cuda else 0
    loader = DataLoader(batches, sampler=steps, batch_size=None, num_workers=workers,
                        pin_memory=cuda, worker_init_fn=keep_out)
    for batch in loader:
        yield type(batch)(*(t.to(device, non_blocking=True) for t in batch))

HELD = []                                           # open files that lock a run's folder

def keep_out(worker):
    """Ctrl-C is for the process that can save, not for one that makes batches; nor must a lock
    outlive that one."""
    if hasattr(os, "setsid"):
        os.setsid()
    for handle in HELD:
        os.close(handle)
