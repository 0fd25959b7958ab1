"""The whole pretraining step against PyTorch, channels_last, lightly's loss.

  python benchmarks/step.py --peers=peers/bin/python --output=step.json

Ours is the step that `simclr_jax.pretrain` runs: two views of uint8 images made
within it, network, NT-Xent, probe, gradient, LARS; once more with views that
are there already, which shows what making them costs. Theirs gets ready views,
SGD and no probe; on a GPU under bfloat16 autocast and torch.compile. The second
peer has the loss of solo-learn (exponentials, then sums) and is not compiled.

On a CPU: ResNet-18, 32 pixels, batch 64. On one GPU: ResNet-50 at 224 pixels
from a canvas of 256 and ResNet-18 at 32, both batch 512. Beside each stand two
floors: FLOPs over the measured rate of a matrix product, and the bytes that the
compiled program's kernels read and write over the measured rate of a copy.
"""

import jax
import numpy as np
import rounds

from simclr_jax import build, cli, flops, parallel

# name: recipe, depth, width, side, canvas, batch, steps a round, at least
CASES = {
  "cpu": ("cifar10", 18, 1.0, 32, 32, 64, 1, 0.8),
  "resnet50": ("imagenet", 50, 1.0, 224, 256, 512, 10, 1.2),
  "resnet18": ("cifar10", 18, 1.0, 32, 32, 512, 20, 1.2),
}


def make_form(config, steps, views=None):
  """(one round of `steps` steps, FLOPs and bytes of a step on each device)."""
  step, state, key = rounds.pretraining(config)
  batch = rounds.batch_of(config)
  if views is not None:
    batch["image"] = parallel.shard({"views": views})["views"]
  compiled, holder = step.lower(state, batch, key).compile(), [state]

  def one_round():
    for _ in range(steps):
      holder[0], metrics = compiled(holder[0], batch, key)
    jax.block_until_ready((holder[0], metrics))

  plain = config.copy_and_resolve_references()
  plain.model.conv = "xla"  # without what our own forms compute in addition
  costs = {
    "flops": flops.count(rounds.pretraining(plain)[0], holder[0], batch, key),
    "bytes": rounds.bytes_moved(compiled.as_text()),
  }
  return lambda: rounds.seconds_of(one_round), costs


def given_views(config):
  """(In place of `augment.two_views`, pairs of random views in the batch)."""
  size = config.data.image_size
  shape = (config.batch_size, 2, size, size, 3)
  views = np.random.default_rng(1).random(shape, np.float32)

  def take(key, images, **_):
    return images.reshape(-1, *images.shape[2:])

  return take, views.astype(build.view_dtype(config))


def main():
  cli.setup()
  parser = rounds.parser(__doc__)
  on_cpu = jax.default_backend() == "cpu"
  default = ["cpu"] if on_cpu else ["resnet50", "resnet18"]
  parser.add_argument("--cases", nargs="+", choices=CASES, default=default)
  parser.add_argument(
    "--plain", action="store_true", help="also XLA's own conv"
  )
  args = parser.parse_args()
  lines, versions = [], {}
  for case in args.cases:
    recipe, depth, width, side, canvas, batch, steps, wanted = CASES[case]
    config = cli.load_recipe(recipe, stage="pretrain")
    config.batch_size = batch * jax.device_count()
    config.data.update(image_size=side, canvas_size=canvas)
    config.model.update(depth=depth, width=width)
    forms, costs = {}, {}
    forms["simclr_jax"], costs = make_form(config, steps)
    if args.plain:
      other = config.copy_and_resolve_references()
      other.model.conv = "xla"
      forms["with XLA's convolution"], _ = make_form(other, steps)
    make_views = build.make_views
    take, views = given_views(config)
    build.make_views = lambda config, take=take: take
    forms["views given"], _ = make_form(config, steps, views)
    build.make_views = make_views
    options = {
      "depth": depth,
      "width": width,
      "size": side,
      "batch": batch,
      "steps": steps,
    }
    with (
      rounds.maybe_peer(args.peers, "step", compile=not on_cpu, **options) as (
        pytorch,
        found,
      ),
      # Two networks of the large case do not fit beside ours.
      rounds.maybe_peer(
        "" if case == "resnet50" else args.peers,
        "step",
        compile=False,
        loss="exp_sum",
        **options,
      ) as (solo, _),
    ):
      if pytorch:
        forms["PyTorch"], versions = pytorch, found
      if solo:
        forms["solo-learn's step"] = solo
      seconds = rounds.alternate(forms, args.rounds)
    floor = rounds.floors()
    more = {
      "gflop_an_image": costs["flops"] / batch / 1e9,
      "floor_of_flops": costs["flops"] / floor["tflops"] / 1e12,
      "floor_of_bytes": costs["bytes"] / floor["gbytes"] / 1e9,
      "measured_rates": floor,
      "augmentation_share": _share(seconds),
    }
    title = f"step: ResNet-{depth} x{width:g}, {side} pixels, batch {batch}"
    lines.append(
      rounds.report(
        title,
        seconds,
        count=steps * batch * (1 if pytorch else jax.device_count()),
        ours="simclr_jax",
        at_least={"PyTorch": wanted},
        **more,
      )
    )
    taken = float(np.median(seconds["simclr_jax"])) / steps
    print(
      f"  a step {1e3 * taken:.1f} ms; floors: FLOPs "
      f"{1e3 * more['floor_of_flops']:.1f} ms at {floor['tflops']:.3g} TFLOP/s,"
      f" bytes {1e3 * more['floor_of_bytes']:.1f} ms at {floor['gbytes']:.3g} "
      f"GB/s; {more['gflop_an_image']:.1f} GFLOP an image; augmentation "
      f"{more['augmentation_share']:.1%} of the step"
    )
  rounds.write(lines, args, peers=versions)


def _share(seconds) -> float:
  """The part of our step that making the views takes."""
  pairs = zip(seconds["simclr_jax"], seconds["views given"], strict=True)
  return float(np.median([1 - given / whole for whole, given in pairs]))


if __name__ == "__main__":
  main()
