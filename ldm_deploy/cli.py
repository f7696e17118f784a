"""The command line: parse, then import and call. Nothing heavy is imported before a command is chosen.

Exit codes: 0 kept; 1 error; 2 arguments, configuration or budget file; 3 a gate failed; 4 a required gate
could not be measured; 130 interrupted.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer import Argument, Option

from ldm_deploy import commands
from ldm_deploy.errors import ConfigError, LdmDeployError

# Every command takes these four.
Json = Annotated[Path | None, Option("--json", metavar="FILE", help="Write the result as JSON.")]
Seed = Annotated[int, Option("--seed", min=0, help="Seed of everything random.")]
Threads = Annotated[int | None, Option("--threads", min=1, help="CPU threads (all that are allowed).")]
Quiet = Annotated[bool, Option("--quiet", help="Show no progress.")]

Bundle = Annotated[Path, Argument(metavar="BUNDLE", help="A bundle directory.")]
Source = Annotated[str, Argument(metavar="SOURCE", help="A reference directory, or 'reference' (shipped).")]
Out = Annotated[Path, Option("--out", metavar="DIR", help="Where the result goes.")]
Budget = Annotated[Path | None, Option("--budget", metavar="B.toml", help="Limits (the shipped ones).")]
DRAWS = "Draw for --builds on a Ray cluster."
Builds = Annotated[int, Option("--builds", min=0, metavar="N", help="Search mixed precision: N builds a component.")]
Component = Annotated[list[str] | None, Option("--component", metavar="C", help="Only this; repeatable.")]

AFTER_CTRL_C = {
    "optimize": "run the same command again to resume",
    "train": "run it again with --resume to go on",
    "distill": "run it again with --resume to go on",
}

Result = tuple[dict[str, Any], int]  # what --json writes, and the exit code

app = typer.Typer(
    name="ldm-deploy",
    help="A latent diffusion model goes in, a bundle of engines that proved themselves comes out.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def _program(
    version: Annotated[bool, Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import ldm_deploy

        print(ldm_deploy.__version__)
        raise typer.Exit


def command(function: Callable[..., Result]) -> Callable[..., Result]:
    """Register a command. `--quiet`, `--json` and what goes wrong are the same for all and live here."""
    name = function.__name__.rstrip("_")

    @functools.wraps(function)
    def run(**arguments: Any) -> int:
        try:
            return _run(function, arguments)
        except KeyboardInterrupt:
            print(f"interrupted; {AFTER_CTRL_C.get(name, 'run the same command again')}", file=sys.stderr)
            return 130
        except LdmDeployError as error:
            return _fail(str(error), error.exit_code)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush
            return 1
        except Exception as error:
            message = commands.explain(error)
            if message is None:
                raise  # a bug: its traceback is what we want to see
            return _fail(message, 1)

    app.command(name=name)(run)
    return function


def _run(function: Callable[..., Result], arguments: dict[str, Any]) -> int:
    from ldm_deploy.progress import set_quiet

    set_quiet(arguments["quiet"])
    result, code = function(**arguments)
    if arguments["json"] is not None:
        from ldm_deploy.artifact import atomic_write_json

        atomic_write_json(arguments["json"], result)
    return code


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    return code


@command
def train(
    config: Annotated[str, Argument(metavar="CONFIG", help="reference, quick, tiny or a TOML file.")],
    out: Out,
    data: Annotated[str, Option("--data", metavar="PATH", help="A folder, a zip or 'photos'.")] = "photos",
    resume: Annotated[bool, Option("--resume", help="Go on where a killed run stopped.")] = False,
    init_from: Annotated[str | None, Option("--init-from", metavar="DIR", help="A reference to fine-tune.")] = None,
    json: Json = None,
    seed: Annotated[int | None, Option("--seed", min=0, help="Instead of the configuration's.")] = None,
    threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Train a reference: autoencoder, then diffusion."""
    from ldm_deploy.eval.grid import load_grid
    from ldm_deploy.eval.lpips_distance import Lpips
    from ldm_deploy.eval.reference import measure_reconstruction, score_reference
    from ldm_deploy.training.train import train as run

    return run(
        config, data, out, resume=resume, seed=seed, threads=threads,
        score=lambda directory, data, picture: score_reference(directory, data, picture=picture),
        measure=measure_reconstruction, perceptual=lambda backbone: Lpips(backbone).as_loss(),
        init_from=init_from, report_prompts=load_grid().prompts,
    ), 0  # fmt: skip


@command
def export(
    source: Source,
    out: Out,
    precision: Annotated[str, Option("--precision", metavar="P", help="fp32, fp16 or bf16.")] = "fp32",
    target: Annotated[str, Option("--target", metavar="T", help="<runtime>-<device>.")] = "onnxruntime-cpu",
    component: Component = None,
    sampler: Annotated[str | None, Option("--sampler", metavar="S", help="Of the component pipeline.")] = None,
    steps: Annotated[int | None, Option("--steps", metavar="N", help="Of the component pipeline.")] = None,
    option: Annotated[list[str] | None, Option("--option", metavar="O", help="Of TensorRT: refit, …")] = None,
    layout: Annotated[str, Option("--layout", metavar="L", help="bundle, or optimum's folders.")] = "bundle",
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Turn a model into engines checked against torch."""
    commands.check_words(precisions=[precision], targets=[target], components=component, layouts=[layout])
    from ldm_deploy.cache import user_cache

    if layout == "optimum":
        if component or commands.is_function(source):
            raise ConfigError("--layout optimum is for a whole model; leave --component out, or --layout")
        from ldm_deploy.export.to_optimum import export_optimum

        return export_optimum(
            source, out, precision=precision, target=target, options=option or (), seed=seed, threads=threads,
            cache=user_cache(),
        ), 0  # fmt: skip

    if commands.is_function(source):
        if component is None or len(component) != 1:
            allowed = ", ".join(commands.COMPONENTS[:-1])
            raise ConfigError(f"{source} makes one component; say with --component which it is: {allowed}")
        from ldm_deploy.export.foreign import export_function

        export_function(
            source, component[0], out, precision=precision, target=target, options=option or (), threads=threads,
            cache=user_cache(),
        )  # fmt: skip
        return commands.read_json(out / "bundle.json"), 0
    if "pipeline" in (component or ()):
        if component != ["pipeline"]:
            raise ConfigError("--component pipeline holds the others; export it by itself, into a directory of its own")
        from ldm_deploy.export.whole import export_pipeline

        export_pipeline(
            source, out, precision=precision, target=target, sampler=sampler, steps=steps, options=option or (),
            seed=seed, threads=threads, cache=user_cache(),
        )  # fmt: skip
        return commands.read_json(out / "bundle.json"), 0
    if sampler is not None or steps is not None:
        raise ConfigError("--sampler and --steps are fixed in the component pipeline only; give --component pipeline")
    from ldm_deploy.export.export import export_source

    export_source(
        source, out, variants=[(precision, target)], components=component or None, options=option or (), seed=seed,
        threads=threads, cache=user_cache(),
    )  # fmt: skip
    return commands.read_json(out / "bundle.json"), 0


@command
def quantize(
    directory: Annotated[Path, Argument(metavar="DIR", help="What `ldm-deploy export` wrote.")],
    out: Out,
    target: Annotated[str, Option("--target", metavar="T", help="<runtime>-<device>.")],
    budget: Budget = None,
    calibration: Annotated[Path | None, Option("--calibration", metavar="FILE.npz", help="To reuse.")] = None,
    component: Component = None,
    builds: Builds = 0,
    ray: Annotated[str | None, Option("--ray", metavar="ADDRESS", help=DRAWS)] = None,
    precision: Annotated[str, Option("--precision", metavar="P", help="int8; w8, w4: weights only.")] = "int8",
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Add INT8 engines to exported ones.

    Calibrate, quantize, compare with fp32, and refuse what is wrong or not faster; exit 3 if nothing is left. With
    --component, FILE.npz may be arrays of your own, named after the inputs, the samples on the first axis.
    """
    commands.check_words(targets=[target], components=component)
    commands.check_ray(ray, builds)
    from ldm_deploy.eval.budget import load_budget
    from ldm_deploy.quantize.quantize import quantize_bundle

    if precision == "int8":
        quantize_bundle(
            directory, out, target=target, budget=load_budget(budget), calibration=calibration,
            components=component or None, builds=builds, ray=ray, seed=seed, threads=threads,
        )  # fmt: skip
    else:
        if calibration is not None or builds:
            raise ConfigError(f"--calibration and --builds are for int8; weights in {precision} need neither")
        from ldm_deploy.quantize.weight_only import quantize_weights

        quantize_weights(
            directory, out, precision=precision, target=target, budget=load_budget(budget),
            components=component or None, seed=seed, threads=threads,
        )  # fmt: skip
    data = commands.read_json(out / "bundle.json")
    return data, 0 if commands.show_quantized(data, target, precision) else 3


@command
def distill(
    reference: Source,
    recipe: Annotated[str, Option("--recipe", metavar="R", help="steps, decoder, prune or int8.")],
    out: Out,
    data: Annotated[str | None, Option("--data", metavar="PATH", help="A folder, a zip or 'photos'.")] = None,
    config: Annotated[str | None, Option("--config", metavar="C", help="A preset or a TOML file.")] = None,
    method: Annotated[str | None, Option("--method", metavar="M", help="Of steps: consistency, progressive.")] = None,
    init_from: Annotated[str | None, Option("--init-from", metavar="DIR", help="A pruned U-Net; a decoder.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on where a killed run stopped.")] = False,
    json: Json = None,
    seed: Annotated[int | None, Option("--seed", min=0, help="Instead of the configuration's.")] = None,
    threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Train a student of a reference: fewer steps, a smaller decoder, a smaller U-Net, or one that bears INT8."""
    commands.check_words(recipes=[recipe])
    images = data or os.environ.get("LDM_DEPLOY_DATA") or "photos"
    options: dict[str, Any] = {"config": config, "resume": resume, "seed": seed, "threads": threads}
    if recipe == "steps":
        run = commands.stage_function("ldm_deploy.training.distill_steps", "distill_steps")
        return run(reference, images, out, method=method, init_from=init_from, **options), 0
    if method is not None:
        raise ConfigError(f"--method is for --recipe steps, not {recipe}; leave it out")
    if init_from is not None and recipe != "decoder":
        raise ConfigError(f"--init-from is for --recipe steps and --recipe decoder, not {recipe}; leave it out")
    if recipe == "decoder":
        from ldm_deploy.eval.lpips_distance import Lpips
        from ldm_deploy.eval.reference import measure_reconstruction

        options |= {"measure": measure_reconstruction, "perceptual": lambda backbone: Lpips(backbone).as_loss()}
        options["init_from"] = init_from
    module = {"decoder": "distill_decoder", "prune": "prune", "int8": "distill_int8"}[recipe]
    run = commands.stage_function(f"ldm_deploy.training.{module}", module)
    return run(reference, images, out, **options), 0


@command
def analyze(
    reference: Source,
    data: Annotated[str | None, Option("--data", metavar="PATH", help="A folder, a zip or 'photos'.")] = None,
    out: Annotated[Path, Option("--out", metavar="DIR", help="For the page.")] = Path("build/analysis"),
    study_steps: Annotated[int, Option("--study-steps", min=0, help="Also train ten autoencoders, so long.")] = 0,
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Latent space, cost at any size, and what a latent loses."""
    from ldm_deploy.eval.analysis.analyze import analyze_reference, print_analysis

    images = data or os.environ.get("LDM_DEPLOY_DATA") or "photos"
    result = analyze_reference(reference, images, out, study_steps=study_steps, seed=seed, threads=threads)
    print_analysis(result)
    print(f"page: {out / 'analysis.html'}")
    return result, 0


@command
def eval_(
    directory: Annotated[Path, Argument(metavar="DIR", help="A bundle, a reference or a folder of images.")],
    budget: Budget = None,
    reference: Annotated[Path | None, Option("--reference", metavar="DIR", help="The fp32 model, or images.")] = None,
    against: Annotated[Path | None, Option("--against", metavar="REPORT.json", help="An earlier result.")] = None,
    data: Annotated[str | None, Option("--data", metavar="PATH", help="Images of your own to reconstruct.")] = None,
    student: Annotated[list[str] | None, Option("--student", metavar="S", help="Beside the reference; repeat.")] = None,
    out: Annotated[Path | None, Option("--out", metavar="DIR", help="For the report (DIR.report).")] = None,
    processes: Annotated[int | None, Option("--processes", min=1, help="To compare images with.")] = None,
    ray: Annotated[str | None, Option("--ray", metavar="ADDRESS", help="Compare images on a Ray cluster.")] = None,
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Measure every variant and check the budget.

    Quality, latency, memory and size against the fp32 reference in torch, with the same seeds; with --against also
    against an earlier report.json of this bundle, and exit 3 if it was better. Of a folder of images: their quality
    against the images of the same names in --reference. Of a reference: what it is worth; with --student, each a
    reference or a bundle, the teacher and its students side by side.
    """
    from ldm_deploy.eval import reconstruction
    from ldm_deploy.models.sources import SHIPPED, resolve_source

    if str(directory) in SHIPPED and not directory.exists():
        directory = resolve_source(directory)
    if (directory / "model.json").is_file():
        if against is not None:
            raise ConfigError(f"{directory} is a reference, and --against compares bundles; leave it out")
        from ldm_deploy.eval.reference import score_reference

        images = data or os.environ.get("LDM_DEPLOY_DATA")
        if images is None:
            raise ConfigError(f"{directory} is a reference, which is scored on images; give --data PATH")
        if student:
            from ldm_deploy.eval.scoreboard import write_scoreboard

            return write_scoreboard(directory, student, images, out or Path("build/scoreboard"), seed, threads), 0
        if reconstruction.is_plain_folder(images):
            record = reconstruction.reconstruct_reference(directory, images, threads=threads, seed=seed)
            print("\n".join(reconstruction.describe(directory.name, record)))
            return {"format": 1, "reconstruction": record}, 0
        return score_reference(directory, images), 0
    if student:
        raise ConfigError(f"{directory} is no reference, and --student is for one's students; leave it out")
    from ldm_deploy.eval import folders
    from ldm_deploy.eval.budget import load_budget

    report_dir = out or directory.absolute().with_name(directory.absolute().name + ".report")
    if folders.is_meant(directory, reference):
        if reference is None:
            raise ConfigError(
                f"{directory} is a folder of images; give the images to compare them with: --reference DIR"
            )
        report = folders.compare_folders(
            directory, reference, report_dir, processes=processes or threads, ray_address=ray,
            budget=load_budget(budget) if budget else None, seed=seed,
        )  # fmt: skip
        print("\n".join(folders.describe(report)))
        return report, folders.exit_code(report)
    if processes is not None or ray is not None:
        raise ConfigError(f"--processes and --ray are for two folders of images, and {directory} is none")
    from ldm_deploy.eval.compare import evaluate_bundle
    from ldm_deploy.eval.regression import read_stored
    from ldm_deploy.eval.report import exit_code, print_table, write_report

    limits = load_budget(budget)
    stored = None if against is None else read_stored(against)
    report = evaluate_bundle(
        directory, reference=reference, budget=limits, threads=threads, seed=seed, images=data, against=stored
    )
    write_report(report, report_dir)
    print_table(report)
    for row in (report["baseline"], *report["variants"]) if data is not None else ():
        if row.get("reconstruction"):
            print("\n".join(reconstruction.describe(row["name"], row["reconstruction"])))
    return report, exit_code(report)


@command
def optimize(
    source: Source,
    out: Out,
    target: Annotated[list[str] | None, Option("--target", metavar="T", help="Repeatable.")] = None,
    budget: Budget = None,
    builds: Builds = 0,
    ray: Annotated[str | None, Option("--ray", metavar="ADDRESS", help=DRAWS)] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan with a time estimate; do nothing.")] = False,
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """All of it, from a reference to a bundle that keeps its budget."""
    if commands.is_function(source):
        raise ConfigError(f"{source} makes one component, and optimize needs a whole model; use export --component")
    commands.check_words(targets=target)
    commands.check_ray(ray, builds)
    from ldm_deploy.optimize import optimize as run
    from ldm_deploy.optimize import show_plan

    targets = target or ["onnxruntime-cpu"]
    if dry_run:
        return show_plan(source, targets, builds=builds, threads=threads), 0
    report = run(source, out, targets=targets, budget=budget, builds=builds, ray=ray, seed=seed, threads=threads)
    from ldm_deploy.eval.report import exit_code, print_table

    print_table(report)
    print(f"bundle: {out}\nreport: {out / 'report' / 'report.html'}")
    return report, exit_code(report)


@command
def sample(
    bundle: Bundle,
    prompt: Annotated[str, Argument(metavar="PROMPT")],
    out: Annotated[Path, Option("--out", metavar="IMAGE.png")],
    steps: Annotated[int | None, Option("--steps", metavar="N", help="Sampler steps.")] = None,
    guidance_scale: Annotated[float | None, Option("--guidance-scale", metavar="X")] = None,
    negative_prompt: Annotated[str | None, Option("--negative-prompt", metavar="TEXT")] = None,
    engine: Annotated[str | None, Option("--engine", metavar="E", help="A variant; see inspect.")] = None,
    size: Annotated[str | None, Option("--size", metavar="HxW", help="Height and width in pixels.")] = None,
    sampler: Annotated[str | None, Option("--sampler", metavar="S", help="ddim, dpmsolver++, …")] = None,
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Draw an image with a bundle."""
    request = {
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "size": commands.parse_size(size),
        "sampler": sampler,
    }
    return commands.draw(bundle, prompt, out, engine, threads, request), 0


@command
def verify(
    bundle: Bundle,
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Check every file of a bundle; no engine is opened."""
    from ldm_deploy.runtime.bundle import verify_bundle

    verify_bundle(bundle)
    print(f"{bundle}: every file is as it was written")
    return {"format": 1, "bundle": str(bundle), "verified": True}, 0


@command
def inspect(
    bundle: Bundle,
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Show what a bundle holds."""
    return commands.show_bundle(bundle), 0


@command
def bench(
    bundle: Bundle,
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Latency of every engine and variant, in interleaved rounds."""
    from ldm_deploy.eval.bench import bench_bundle, print_bench

    result = bench_bundle(bundle, threads=threads, seed=seed)
    print_bench(result)
    return result, 0


@command
def cache(
    clear: Annotated[bool, Option("--clear", help="Remove every entry.")] = False,
    json: Json = None, seed: Seed = 0, threads: Threads = None, quiet: Quiet = False,
) -> Result:  # fmt: skip
    """Show or clear the cache of exports.

    It lies at LDM_DEPLOY_CACHE, or where the system keeps caches, and holds LDM_DEPLOY_CACHE_LIMIT (20GB) at most.
    """
    from ldm_deploy.cache import show_cache, user_cache

    exports = user_cache()
    if clear:
        print(f"freed {exports.clear() / 1e6:.2f} MB")
    return show_cache(exports), 0


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of `ldm-deploy`; `arguments` without the program's name."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(given or ["--help"], prog_name="ldm-deploy", standalone_mode=False)
    except Exception as error:  # a usage error; its class is private to typer and has moved between versions
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "ldm-deploy"
        code = _fail(f"{error.format_message().rstrip('.')}; see `{where} --help`", 2)
    sys.exit(code or 0)
