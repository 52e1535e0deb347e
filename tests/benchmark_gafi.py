"""Images per second of the three loops of gafi.py: GAN training, sampling + filtering, classifier training.

    python tests/benchmark_gafi.py                                       # the miniature's networks, here
    python tests/benchmark_gafi.py --preset cifar10 --device cuda --precision bf16 --compile --peak 989

Not a test: it asserts no time. Random weights and images; the loops are those of the script. --peak: the device's
TFLOP/s in this precision, for the share of it that is reached. FLOPs are counted by PyTorch, 2 per multiply-add.
On the CPU first: the operations of a GAN step of the paper's depth and, at a size where nothing is left to compute, the
processor's time for them.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from types import SimpleNamespace  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import gafi as gf  # noqa: E402
from common.distributed import Dist  # noqa: E402
from common.report import print_table  # noqa: E402

VIEWS = """view _unsafe_view expand permute t transpose slice detach alias unbind select split split_with_sizes
as_strided unsqueeze squeeze _reshape_alias chunk empty empty_like""".split()


class Operations(TorchDispatchMode):
    """Counts what computes or copies something."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.__name__.split(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def gan_step(args, data, device):
    """-> the GAN, a function that does its next step on (x, y, z)"""
    gan = gf.BigGAN(args, data, 0, device)
    run, team = SimpleNamespace(log=lambda *_, **__: None, made=lambda: None), Dist(0, 0, 1, device)
    loop = gan.loop(run, "gan", 10**9, team, Path("never written.safetensors"), 10**9)
    numbers = itertools.count()

    def step(x, y, z):
        loop._phases = 0  # as at the start of each step of `for step in loop`, which shows a bar
        return gan.step(loop, next(numbers), x, y, z)

    return gan, step


def host_costs():
    args = gf.Args(image_size=8, gan_width=2, gan_latent=4, gan_batch=4)
    _, step = gan_step(args, SimpleNamespace(n_classes=10, channels=3), torch.device("cpu"))
    batch = torch.randn(4, 3, 8, 8), torch.randint(10, (4,)), torch.randn(4, 4, 4)
    step(*batch), step(*batch)
    with Operations() as operations:
        step(*batch)
    start = time.process_time()
    for _ in range(20):
        step(*batch)
    print(f"a GAN step: {operations.number} operations, {(time.process_time() - start) * 50:.0f} ms of the processor")


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def rate(function, images, device, seconds):
    """Images per second of function(), which handles `images` of them; two calls warm up."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    function(), function(), wait()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        function()
        calls += 1
        if calls % 10 == 0:
            wait()
    wait()
    return calls * images / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=list(gf.PRESETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--gan-precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=10, help="per loop, after warm-up")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device")
    asked = parser.parse_args()
    flags = {**gf.PRESETS[asked.preset], "precision": asked.precision, "compile": asked.compile}
    flags["gan_precision"] = asked.gan_precision
    args, device = gf.Args(**flags), torch.device(asked.device)
    channels = 1 if args.dataset in ("digits", "fashionmnist") else 3

    def batch(b):
        shape = (b, channels, args.image_size, args.image_size)
        return torch.rand(shape, device=device) * 2 - 1, torch.randint(10, (b,), device=device)

    if device.type == "cpu":
        host_costs()
    data = SimpleNamespace(n_classes=10, channels=channels)
    gan, step = gan_step(args, data, device)
    net, frozen = (gf.make_classifier(args, data, 0).to(device, memory_format=torch.channels_last) for _ in range(2))
    frozen.eval().requires_grad_(False)
    fast = torch.compile(net, dynamic=True) if args.compile else net
    optimizer = gf.SGDW(net.parameters(), args.resnet_lr, args.resnet_wd)
    g = torch.Generator(device).manual_seed(0)
    x, y = batch(args.gan_batch)
    zs = torch.randn(args.gan_d_steps + 1, args.gan_batch, args.gan_latent, device=device)
    real, label = batch(args.resnet_batch)

    def classifier_step():
        images = gf.augmented(real, args, g).contiguous(memory_format=torch.channels_last)
        with gf.autocast(args.precision, device):
            logits = fast(images)
        loss = F.cross_entropy(logits.float(), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    plain, plain_step = gan_step(dataclasses.replace(args, compile=False), data, device)
    count = {"GAN training (real images)": flops(lambda: plain_step(x, y, zs))}
    count["classifier training"] = flops(lambda: net(real).sum().backward())
    sampler = gf.ScoredGenerator(args, gan.ema, frozen)
    m = args.gen_micro_batch
    z, c = torch.randn(m, args.gan_latent, device=device), torch.arange(m, device=device) % 10
    count["sampling + filtering"] = flops(lambda: frozen(plain.ema.eval()(z, c)))

    def filtered():
        images, confidence = sampler(z, c)
        return images[confidence > 0.5]

    loops = {
        "GAN training (real images)": (lambda: step(x, y, zs), args.gan_batch),
        "sampling + filtering": (filtered, m),
        "classifier training": (classifier_step, args.resnet_batch),
    }
    rows = []
    for name, (function, images) in loops.items():
        r, f = rate(function, images, device, asked.seconds), count[name] / images
        share = f"{100 * r * f / (asked.peak * 1e12):.1f} %" if asked.peak else ""
        rows.append([name, f"{r:.0f}", f"{f / 1e9:.3f}", f"{r * f / 1e12:.3f}", share])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precision = f"{asked.precision}, GAN {asked.gan_precision}"
    print(f"{asked.preset}, {precision}, compile {asked.compile}; {where}; torch {torch.__version__}")
    print_table(["loop", "images/s", "GFLOP/image", "TFLOP/s", "share of peak"], rows)


if __name__ == "__main__":
    main()
