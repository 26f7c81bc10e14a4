"""Engines side by side in one run: seconds an image of bare towers and of whole methods, and what each engine does to every metric.

    python tests/bench_engines.py                  # the embedded pair at 256 px (minutes)
    python tests/bench_engines.py --full           # ViT-L/14 and its partners at 518 px, random weights (an hour on one core, 8 GB, 12 GB of disk)
    python tests/bench_engines.py --drift          # trains the four methods on drawn images, writes paper_figures/tables/engine_drift.csv
    python tests/bench_engines.py --full --only visualad ssvp --engines "torch fp32" "openvino bf16" --csv FILE

Every line is a process of its own: CPU and wall seconds an image (the least of the repetitions after a first prediction), and the peak of
its memory. Ratios are of CPU seconds, which a busy machine changes least: to the method's bare towers (their sum) in the same engine, and to
PyTorch in fp32, all measured in the same run. Not collected by pytest.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ENGINES = ("torch fp32", "torch routed", "torch bf16", "onnxruntime fp32", "openvino fp32", "openvino bf16", "openvino int8")  # routed: fp32 products through oneDNN
TINY = dict(
    visualad=dict(backbone="tiny-dino", image_size=256), dapo=dict(clip="tiny-clip", image_size=256),
    dma_sap=dict(clip="tiny-clip", dino="tiny-dino", image_size=256), ssvp=dict(clip="tiny-clip", dino="tiny-dino", image_size=256))
LARGE = dict(
    visualad=dict(backbone="clip-vitl14-336", weights="random:0", image_size=518), dapo=dict(clip="clip-vitl14-336", clip_weights="random:0", image_size=518),
    dma_sap=dict(clip="clip-vitl14-336", clip_weights="random:0", dino="dinov2-vitb14-reg", dino_weights="random:0", image_size=518),
    ssvp=dict(clip="clip-vitl14-336", clip_weights="random:0", dino="dinov3-vitl16", dino_weights="random:0", image_size=518, dino_size=592))


def peak_gb() -> float:
    "Highest resident size so far"
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


def measure(what: str, parameters: dict, engine: str, batch: int, repeats: int, threads: int, folder: str) -> dict:
    "One line of the table: a method, or a tower 'name weights size'"
    import torch
    torch.set_num_threads(threads)
    from zsad_nb.backbones.backbones import create_backbone
    from zsad_nb.backbones.engines import Engine, fast_products
    from zsad_nb.backbones.graphs import drawn_images
    from zsad_nb.data.images import Batch
    from zsad_nb.methods.base import create
    engine, precision = engine.split()
    os.environ["ZSAD_PRODUCTS"] = "" if precision == "routed" else "usual"  # torch fp32 is PyTorch as it comes; routed is what the package runs
    precision = precision.replace("routed", "fp32")
    options = {} if engine == "torch" else dict(folder=folder)
    if what == "tower":
        tower = create_backbone(parameters["name"], parameters["weights"], parameters["size"])
        image = drawn_images((parameters["size"],) * 2, batch)
        def function(image):
            seen = tower(image, taps=(tower.depth,))
            return dict(cls=seen.cls, patches=seen.patches[0])
        runner = Engine(engine, precision, **options)
        def run():
            with torch.inference_mode(), fast_products(): return function(image) if (engine, precision) == ("torch", "fp32") else runner(tower, function, dict(bare=tower.hash), image)
    else:
        torch.manual_seed(0)
        method = create(what, **parameters).eval().use_engine(engine, precision, **options)
        size = method.clip.size if hasattr(method, "clip") else method.backbone.size
        image = drawn_images((size,) * 2, batch)
        given = Batch(image, torch.zeros(batch, 1, size, size, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.long), ["bottle"] * batch, ["x"] * batch, torch.ones(batch, dtype=torch.bool))
        def run(): return method.predict(given)
    start = time.perf_counter()
    run()
    first, wall, cpu = time.perf_counter() - start, [], []
    for _ in range(repeats):
        start, began = time.perf_counter(), time.process_time()
        run()
        wall.append((time.perf_counter() - start) / batch)
        cpu.append((time.process_time() - began) / batch)
    return dict(cpu=min(cpu), wall=min(wall), first=first, gb=peak_gb())


def child(*given, threads: int) -> dict:
    environment = os.environ | {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--child", json.dumps(given)], capture_output=True, text=True, env=environment)
    if done.returncode: return dict(error=done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else f"exit {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def towers(parameters: dict) -> list[dict]:
    "The bare image towers of a method"
    found = []
    for role in ("backbone", "clip", "dino"):
        if role not in parameters: continue
        size = parameters.get("dino_size") if role == "dino" and "dino_size" in parameters else parameters["image_size"]
        found.append(dict(name=parameters[role], weights=parameters.get("weights" if role == "backbone" else f"{role}_weights", "pretrained"), size=size))
    return found


def times(args):
    import pandas as pd
    configurations, rows, bare = LARGE if args.full else TINY, [], {}
    batches = args.batch or ([1] if args.full else [1, 8])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for engine in args.engines:
            for batch in batches:
                for name in args.only:
                    parameters, total = configurations[name], 0.0
                    for tower in towers(parameters):
                        key = json.dumps([tower, engine, batch], sort_keys=True)
                        if key not in bare:
                            bare[key] = child("tower", tower, engine, batch, args.repeats, args.threads, folder, threads=args.threads)
                            rows.append(dict(what=f"{tower['name']} {tower['size']}", engine=engine, batch=batch, **bare[key]))
                            print(rows[-1], flush=True)
                        total += bare[key].get("cpu", float("nan"))
                    found = child(name, parameters, engine, batch, args.repeats, args.threads, folder, threads=args.threads)
                    rows.append(dict(what=name, engine=engine, batch=batch, **found, ratio=found.get("cpu", float("nan")) / total))
                    print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    usual = {(r.what, r.batch): r.cpu for r in table.itertuples() if r.engine == "torch fp32"}
    table["speedup"] = [usual.get((r.what, r.batch), float("nan")) / r.cpu for r in table.itertuples()]
    with pd.option_context("display.width", 200, "display.max_rows", None): print(table.round(4).to_string(index=False))
    if args.csv: table.to_csv(args.csv, index=False, float_format="%.4g")


def drift(args):
    "Every metric's difference to PyTorch in fp32, in points (hundredths), on the drawn target set; small trainings with a fixed seed"
    import pandas as pd, torch
    torch.set_num_threads(args.threads)
    from zsad_nb.backbones.graphs import EngineError
    from zsad_nb.core import seed_everything, write_atomically
    from zsad_nb.data.synthetic import synthetic_index
    from zsad_nb.evaluation.evaluate import evaluate
    from zsad_nb.learning.training import fit, recipe_of
    from zsad_nb.methods.base import create
    rows, size = [], args.size
    with tempfile.TemporaryDirectory(dir=args.folder) as room:
        room = Path(room)
        auxiliary, target = synthetic_index(room/"auxiliary", "auxiliary", size, args.train_images, args.train_images), synthetic_index(room/"target", "target", size, args.images, args.images)
        for name in args.only:
            for kind in args.states:
                seed_everything(0)
                method = create(name, **{**TINY[name], "image_size": size})
                os.environ["ZSAD_PRODUCTS"] = "usual"
                if kind == "trained": fit(method, auxiliary, recipe_of(method, epochs=args.epochs, lr_scale=args.lr_scale, seed=0), progress=False, cache=room/"features")
                expected = None
                for engine in ("torch fp32", *[e for e in args.engines if e != "torch fp32"]):
                    which, precision = engine.split()
                    os.environ["ZSAD_PRODUCTS"] = "" if precision == "routed" else "usual"
                    method.use_engine(which, precision.replace("routed", "fp32"), **({} if which == "torch" else dict(folder=room/"engines")))
                    start = time.perf_counter()
                    try: found = evaluate(method, target, size=size, progress=False).mean.filter(regex="^(image|pixel)_") * 100
                    except EngineError as error:  # too far away at export: nobody gets numbers from it
                        rows.append(dict(method=name, state=kind, engine=which, precision=precision, refused=str(error)))
                        print(f"{name} {kind} {engine}: refused, {error}", flush=True)
                        continue
                    if expected is None: expected = found
                    rows.append(dict(method=name, state=kind, engine=which, precision=precision, **((found - expected).round(3) + 0.0 if engine != "torch fp32" else found).to_dict(), largest=(found - expected).abs().max()))
                    print(f"{name} {kind} {engine}: largest difference {rows[-1]['largest']:.3f} points at {(found - expected).abs().idxmax()}; {time.perf_counter() - start:.0f} s", flush=True)
            table = pd.DataFrame(rows)
            write_atomically(args.csv or ROOT/"paper_figures"/"tables"/"engine_drift.csv", lambda p, table=table: table.to_csv(p, index=False, float_format="%.3f"))
    with pd.option_context("display.width", 250, "display.max_columns", None): print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="ViT-L/14 at 518 px")
    parser.add_argument("--drift", action="store_true", help="metrics instead of times")
    parser.add_argument("--only", nargs="+", default=list(TINY), choices=list(TINY))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 with --full, otherwise 1 and 8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", 1)))
    parser.add_argument("--folder", help="where graphs go meanwhile; default: the system's temporary folder")
    parser.add_argument("--csv", help="also write the table here")
    for name, default in (("size", 192), ("images", 72), ("train-images", 6), ("epochs", 2)): parser.add_argument(f"--{name}", type=int, default=default, help="of --drift (default: %(default)s)")
    parser.add_argument("--lr-scale", type=float, default=8.0, help="of --drift (default: %(default)s)")
    parser.add_argument("--states", nargs="+", default=["trained"], choices=("trained", "untrained"), help="of --drift (default: %(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: print(json.dumps(measure(*json.loads(args.child))))
    elif args.drift: drift(args)
    else: times(args)
