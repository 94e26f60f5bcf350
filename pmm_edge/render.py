"""Print the results of commands for people, and put them into the JSON form that programs read."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.markup import escape

from pmm_edge.console import note, out, percent, print_line, print_table, printable
from pmm_edge.runs import run_of
from pmm_edge.spec import Distance, Reduction, describe_precision

if TYPE_CHECKING:
    from pmm_edge.bench import BenchResult
    from pmm_edge.bench.calibrate import CalibrationResult
    from pmm_edge.bench.certification import Verification
    from pmm_edge.bench.evaluation import Evaluation
    from pmm_edge.bench.regression import Comparison
    from pmm_edge.data.checks import Analysis
    from pmm_edge.data.dataset import ReidDataset
    from pmm_edge.doctor import Diagnosis
    from pmm_edge.export import ExportResult
    from pmm_edge.gallery.gallery import AddResult, GalleryInfo, SearchResult
    from pmm_edge.images import BadImage
    from pmm_edge.pictures.album import Album
    from pmm_edge.retrieval import RetrievalResult
    from pmm_edge.runtime.embed_files import EmbeddedFiles
    from pmm_edge.runtime.embedder import Match
    from pmm_edge.runtime.shards import EmbeddedShards
    from pmm_edge.trainer.train import TrainResult

LISTED = 20
"""Number of unreadable images that are listed; `--json` names all of them."""


def show_written(*files: Path | None) -> None:
    """Name the files that a command wrote; those in the working directory, relative to it."""
    here = Path.cwd()
    short = (file.relative_to(here) if file.is_relative_to(here) else file for file in files if file)
    if written := [escape(str(file)) for file in short]:
        note(f"[dim]wrote {', '.join(written)}[/]")


def _fields(result: object, *names: str) -> dict[str, Any]:
    return {name: getattr(result, name) for name in names}


def show_training(result: TrainResult) -> None:
    """Print retrieval before training and of the best epoch, and the next command."""
    figures = {"before training": result.before, "best epoch": result.best}
    rows = [(name, *map(percent, vars(one).values())) for name, one in figures.items() if one]
    title = f"retrieval in %, unseen identities · {result.folder}"
    print_table(title, ["", "Rank-1", "mAP", "mINP", "mAP@50"], rows)
    for one in result.calibration.euclidean.thresholds if result.calibration else ():
        rates = f"false-match rate {one.fmr:g}, true-match rate {percent(one.tmr)} %"
        print_line(f"same person up to a distance of {one.distance:.4g}: {rates}")
    folder = escape(shlex.quote(str(result.folder)))
    if result.finished:
        note(f"next: [bold]pmm export {folder}[/] writes an ONNX file")
    else:
        note(f"interrupted after {result.epochs_done} epochs; resume: [bold]pmm train --resume {folder}[/]")


def show_export(result: ExportResult) -> None:
    """Print the exported files, the sensitivity of layers, engines and bundles."""
    if result.files:
        rows = []
        for file in result.files:
            form, closeness = file.spec.input.form, (f"{file.departure:.1e}", f"{file.cosine_mean:.6f}")
            rows.append((file.path.name, f"{file.size / 1e6:.1f}", file.spec.precision, form, *closeness))
        columns = ("file", "MB", "precision", "input", "max\ndifference", "mean\ncosine")
        print_table(f"exported to {result.files[0].path.parent}", columns, rows)
        for file in result.files:
            if file.spec.quantization:
                print_line(escape(f"{file.path.name}: {describe_precision(file.spec)}"))
        if how := result.files[0].spec.reduction:
            _show_reduction(how, result.files[0].spec.embedding_size)
        if (search := result.files[0].search) and search.layers:
            kinds = {True: "float", False: "int8"}
            losses = [(one.layer, f"{one.loss:.1e}", percent(one.work), kinds[one.kept]) for one in search.layers]
            print_table("sensitivity of each layer to INT8", ("layer", "cosine loss", "% of work", "type"), losses)
    for engine in filter(None, (result.engine, result.served_engine)):
        manifest = engine.manifest
        layers = ", ".join(f"{number} {kind}" for kind, number in manifest.precision.layers.items())
        size, seconds = f"{manifest.engine_size / 1e6:.1f}", f"{manifest.build_seconds:.1f}"
        settings, machine = manifest.settings, manifest.machine
        gpu = machine.compute_capability if settings.gpus else machine.gpu
        title = f"built for {gpu} with {settings.compiler} {machine.tensorrt}"
        row = (engine.path.name, size, str(manifest.settings.batch), layers, seconds)
        print_table(title, ("file", "MB", "batch", "layers", "seconds"), [row])
        if engine.trtexec:
            note(f"[dim]NVIDIA's tool builds and times the same with: {escape(engine.trtexec)}[/]")
    for kind, folder in result.bundles.items():
        note(f"{kind}: {escape(str(folder))} [dim](see its README.md)[/]")


def _show_reduction(how: Reduction, size: int) -> None:
    """Print what a smaller embedding costs."""
    both = {"euclidean": (how.before, how.after), "cosine": (how.before_cosine, how.after_cosine)}
    rows = [
        (
            distance,
            percent(before.mAP),
            percent(after.mAP),
            f"{100 * (after.mAP - before.mAP):+.2f}",
            percent(before.rank1),
            percent(after.rank1),
        )
        for distance, (before, after) in both.items()
        if before and after
    ]
    title = f"PCA{', whitened' * how.whitened}, {how.from_size:,} to {size:,} values: {percent(how.variance)} % of the"
    title += f" variance of {how.images:,} training images; retrieval in % on {how.dataset}"
    columns = ("distance", "mAP before", "mAP after", "points", "Rank-1 before", "Rank-1 after")
    print_table(title, columns, rows)


def bench_command(result: ExportResult) -> str:
    """Return the command that compares exported files with their checkpoint, wherever both are."""
    words, run = ["pmm", "bench", *(str(file.path) for file in result.files)], run_of(result.checkpoint)
    words += ["--reference", str(result.checkpoint)] * (run is None or run_of(result.files[0].path) != run)
    return shlex.join(words) + ("" if run else " --data DATA")


def show_bench(result: BenchResult, tables: bool) -> None:
    """Print parity, retrieval and speed of each model, warnings, files, and why models failed or are not certified."""
    from pmm_edge.bench.tables import all_tables, describe_warning, explanations

    for table in all_tables(result.report) if tables else ():
        print_table(*table)
    for warning in result.report.warnings if tables else ():
        note(f"[yellow]warning:[/] {escape(describe_warning(warning))}")
    for path in result.certificates.removed:
        note(f"[dim]removed {escape(str(path))}, because the model fails[/]")
    for name, reason in result.certificates.refused.items():
        note(f"[dim]no certificate for {escape(name)}: {escape(reason)}[/]")
    show_written(*result.files, *result.certificates.written)
    for model in result.report.models:
        for sentence in explanations(model):
            note(f"[bold]{escape(model.path)}[/] {escape(sentence)}")


def show_comparison(found: Comparison) -> None:
    """Print what got better or worse between two bench reports."""
    from pmm_edge.bench.regression import comparison_table

    print_table(*comparison_table(found))
    for entry in found.notes:
        note(f"[yellow]note:[/] {escape(entry.sentence)}")


def verification_facts(found: Sequence[Verification]) -> dict[str, Any]:
    """The JSON form of `pmm verify`."""
    models = [
        {**vars(one), "passed": not one.failures, "digest": one.certificate and one.certificate.digest} for one in found
    ]
    return {"passed": not any(one.failures for one in found), "models": models}


def show_verification(found: Sequence[Verification]) -> None:
    """Print what was certified of each model, and under which conditions."""
    from pmm_edge.bench.certification import report_of

    for item in found:
        if certificate := item.certificate:
            report = report_of(certificate)
            assert report.parity and report.retrieval and report.retrieval_change
            change = 100 * report.retrieval_change.mAP.difference
            for line in (
                f"{item.model.name}: {certificate.spec.precision}, certified {certificate.created[:10]} against"
                f" {certificate.reference} on {certificate.images:,} images of {certificate.data}",
                f"  cosine {report.parity.whole.cosine_min:.6f} (minimum {report.gates.min_cosine:g}), mAP"
                f" {percent(report.retrieval.mAP)} {change:+.2f} (maximum drop {report.gates.max_map_drop:g} points)",
                f"  digest {certificate.digest}",
            ):
                print_line(escape(line))


def evaluation_facts(found: Evaluation) -> dict[str, Any]:
    """The JSON form of `pmm eval`; figures in 0..1."""
    rows = [
        {"name": name, "queries": result.valid_queries, "figures": _figures(result)}
        for name, result in found.results.items()
    ]
    facts = {"model": found.embedder.path, "data": found.dataset.root, "distance": found.distance}
    facts |= _fields(found.embedder, "backend", "device")
    counts = {"queries": found.results["plain"].valid_queries, "gallery": len(found.dataset.gallery)}
    return {**facts, **counts, "figures": rows[0]["figures"], "rows": rows}


def _figures(result: RetrievalResult) -> dict[str, float]:
    ranks = {f"Rank-{k}": result.rank(k) for k in (1, 5, 10)}
    return {**ranks, "mAP": result.mAP, "mINP": result.mINP, "mAP@50": result.mAP_at_50}


def show_evaluation(found: Sequence[Evaluation]) -> None:
    """Print retrieval figures, one row for each data set and way to use the model, and the size of each data set."""
    rows, sizes = [], []
    for one in found:
        gallery, queries = one.dataset.gallery, one.results["plain"].valid_queries
        for name, result in one.results.items():
            title = one.dataset.name if name == "plain" else f"{one.dataset.name} + {name}"
            rows.append((title, *map(percent, _figures(result).values())))
        sizes.append(f"{one.dataset.name}: {queries:,} queries, {len(gallery):,} gallery images")
        if (pooled := one.results.get("tracklets")) and gallery.tracks is not None:
            sizes[-1] += f" ({pooled.valid_queries:,} and {len({*gallery.tracks.tolist()}):,} tracklets)"
    columns = ("data set", *_figures(found[0].results["plain"]))
    print_table(f"{found[0].embedder.path.name}, {found[0].distance} distance", columns, rows)
    for size in sizes:
        print_line(escape(size))
    note("[dim]mAP@50 is the mAP of the PMM paper, which cuts each ranking at 50; compare mAP with other work.[/]")


def calibration_facts(result: CalibrationResult) -> dict[str, Any]:
    """The JSON form of `pmm calibrate`; rates in 0..1."""
    refused = [{"fmr": fmr, "impostor_pairs_needed": pairs} for fmr, pairs in result.found.refused.items()]
    facts = _fields(result, "model", "written", "stale_certificate")
    return {**facts, "calibration": result.found.calibration, "refused": refused}


def show_calibration(result: CalibrationResult) -> None:
    """Print the thresholds, refused rates, and where the thresholds are now."""
    found, rows = result.found.calibration, []
    for name in get_args(Distance):
        for one in getattr(found, name).thresholds:
            fmr, tmr = one.fmr_interval, one.tmr_interval
            false, true = f"({fmr[0]:.2g}…{fmr[1]:.2g})", f"({percent(tmr[0])}…{percent(tmr[1])})"
            rates = f"{one.fmr:g}\n{false}", f"{percent(one.tmr)}\n{true}"
            rows.append((name, f"{one.distance:.4g}", *rates))
    title = f"{result.model} · {found.dataset}: {found.identities:,} people, {found.genuine_pairs:,} pairs of one"
    title += f" person, {found.impostor_pairs:,} of different people"
    print_table(title, ("distance", "threshold", "false-match rate", "true-match rate, %"), rows)
    print_line("in parentheses: the 95 % interval for other people")
    eer = ", ".join(f"{name} {percent(getattr(found, name).eer)} %" for name in get_args(Distance))
    print_line(f"equal error rate: {eer}")
    for rate, pairs in result.found.refused.items():
        note(f"[yellow]no threshold for a rate of {rate:g}:[/] it needs {pairs:,} pairs of different people")
    if not result.written:
        note("nothing is changed; to export a model with thresholds, calibrate its checkpoint and export it again")
        return
    note(f"[dim]wrote the thresholds into {escape(str(result.model))}[/]")
    if result.before and result.before.data_sha256 != found.data_sha256:
        note(f"[dim]they replace those of {escape(result.before.dataset)}[/]")
    if result.stale_certificate:
        note(f"[yellow]{escape(str(result.stale_certificate))} no longer matches the file[/]; run pmm bench again")
    note(f"next: [bold]pmm export {escape(shlex.quote(str(result.model)))}[/]; older exports keep their thresholds")


def show_match(found: Match) -> None:
    """Print a decision and its threshold."""
    decision = "[green]same person[/]" if found.same else "[yellow]different people[/]"
    relation = "at most" if found.same else "above"
    print_line(f"{decision}: {found.metric} distance {found.distance:.4g}, {relation} {found.threshold.distance:.4g}")
    origin = f"false-match rate of {found.threshold.fmr:g} on {escape(found.calibrated_on)}"
    note(f"[dim]the threshold has a {origin}; on other cameras, run pmm calibrate[/]")


def embedding_facts(found: EmbeddedFiles, model: Path, written: str) -> dict[str, Any]:
    """The JSON form of `pmm embed`."""
    rows, size = found.embeddings.shape
    facts = {"model": model, "source": found.images.source, "rows": rows, "embedding_size": size, "written": written}
    return {**facts, **_fields(found, "skipped", "backend", "device", "seconds")}


def show_embedded(found: EmbeddedFiles, written: str) -> None:
    """Print what `pmm embed` wrote and skipped, and how fast it was."""
    _show_unreadable("skipped", found.skipped)
    rows, size = found.embeddings.shape
    skipped = f", {len(found.skipped):,} skipped" if found.skipped else ""
    print_line(f"{escape(written)}: {rows:,} × {size:,} float32 of {found.images.source}{skipped}")
    unit = "tracklets" if "frames" in (found.images.labels or {}) else "images"
    note(f"[dim]{rows / found.seconds:,.1f} {unit}/s in {found.backend} on {found.device}[/]")


def show_added(done: AddResult, gallery: str) -> None:
    """Print what `pmm gallery add` did."""
    _show_unreadable("skipped", done.skipped)
    left_out = {"known": done.known, "junk": done.junk, "unreadable": len(done.skipped)}
    rest = "".join(f", {count:,} {name}" for name, count in left_out.items() if count)
    print_line(f"{escape(gallery)}: added {done.added:,} rows{rest}; {done.rows:,} in all")


def search_facts(found: SearchResult) -> dict[str, Any]:
    """The JSON form of the result of one query."""
    return {"verdict": found.verdict, **vars(found), "expected_false_matches": found.expected_false_matches}


def show_search(found: Sequence[SearchResult]) -> None:
    """Print the nearest rows of each query, the verdict, and how far to trust it."""
    same = {True: "yes", False: "no", None: "–"}
    for one in found:
        rows = []
        for hit in one.hits:
            who, when = "–" if hit.pid is None else str(hit.pid), f"{hit.time:%Y-%m-%d %H:%M:%S}"
            rows.append((hit.source, f"{hit.distance:.4g}", same[hit.same_person], who, hit.camera or "–", when))
        title = f"{one.query}: {one.verdict}, {one.searched:,} rows searched"
        print_table(title, ("source", f"{one.distance}\ndistance", "same\nperson", "pid", "camera", "time"), rows)
    if found and (threshold := found[0].threshold):
        false = f"{found[0].expected_false_matches:.3g} rows of other people are expected within it"
        note(f"[dim]threshold {threshold.distance:.4g}, false-match rate {threshold.fmr:g} per row: {false}[/]")
    elif found:
        calibrated = "if the model has been calibrated, choose a rate with --fmr"
        note(f"[dim]no threshold: {calibrated}; otherwise run pmm calibrate and pmm export, and use that model[/]")


def show_gallery(found: GalleryInfo) -> None:
    """Print what a gallery contains."""
    times = [f"{moment:%Y-%m-%d %H:%M}" for moment in (found.oldest, found.newest) if moment]
    spec = found.model.spec
    facts = {
        "rows": f"{found.rows:,} × {spec.embedding_size:,} {found.dtype}",
        "identities": f"{found.identities:,}",
        "cameras": ", ".join(found.cameras[:LISTED]) + (", …" if len(found.cameras) > LISTED else ""),
        "times": " to ".join(times),
        "model": f"{spec.architecture} {spec.backbone}, checkpoint {found.model.sha256[:12]}",
        "distance": found.distance,
    }
    if found.size is not None:
        facts["size"] = f"{found.size / 1e6:,.1f} MB"
    if index := found.index:
        facts["index"] = f"{index.lists:,} lists, {index.probes:,} searched, recall@10 {index.recall:.3f}"
    print_table(found.location, ("", ""), list(facts.items()))


def shard_facts(found: EmbeddedShards) -> dict[str, Any]:
    """The JSON form of `pmm embed` into a folder; `skipped` names the first unreadable images."""
    manifest = found.manifest
    facts = {"model": manifest.model, "written": found.folder, "embedding_size": manifest.spec.embedding_size}
    facts |= _fields(manifest, "model_sha256", "dtype", "shards")
    return {**facts, **_fields(found, "rows", "bad", "skipped", "kept", "embedded", "backend", "device", "seconds")}


def show_shards(found: EmbeddedShards) -> None:
    """Print what a folder of embeddings contains now, and how fast this run was."""
    _show_unreadable("skipped", found.skipped, f"{found.folder}/_bad lists", found.bad)
    manifest, kept = found.manifest, f", {found.kept:,} of them by an earlier run" if found.kept else ""
    skipped = f", {found.bad:,} skipped" if found.bad else ""
    size = f"{found.rows:,} × {manifest.spec.embedding_size:,} {manifest.dtype}{skipped}"
    print_line(f"{escape(found.folder)}: {size} in {manifest.shards:,} shards{kept}")
    if found.embedded:
        note(f"[dim]{found.embedded / found.seconds:,.1f} images/s in {found.backend} on {found.device}[/]")


def _show_unreadable(label: str, bad: Sequence[BadImage], listed: str = "--json lists", count: int = 0) -> None:
    for image in bad[:LISTED]:
        note(f"[red]{label}:[/] {escape(f'{image.path}: {image.reason}')}")
    if (more := max(count, len(bad)) - LISTED) > 0:
        note(f"[red]{label}:[/] and {more:,} more; {escape(listed)} all of them")


def show_album(album: Album) -> None:
    """Print the pictures that `pmm visualize` wrote, and the overlap of attention maps."""
    rows = [(kind, path.name) for kind, path in album.files.items()]
    print_table(f"pictures in {album.folder}", ("shows", "file"), rows)
    if (overlap := album.overlap) and overlap.pairs:
        values = [*overlap.pairs.values(), overlap.mean, overlap.chance]
        row = [f"{overlap.images:,}", *("–" if value is None else f"{value:.3f}" for value in values)]
        title = "overlap of the stages' attention; chance: between different images"
        print_table(title, ("images", *overlap.pairs, "mean", "chance"), [row])
    for kind, reason in album.left_out.items():
        note(f"[yellow]no {kind}:[/] {escape(reason)}")


def dataset_facts(dataset: ReidDataset, analysis: Analysis, bad: Sequence[BadImage] | None) -> dict[str, Any]:
    """The JSON form of `pmm data`; `unreadable` is null if the images were not decoded."""
    facts = {"name": dataset.name, "folder": dataset.root, "layout": dataset.layout, "splits": analysis.splits}
    facts |= vars(dataset.reading)
    return {**facts, "expected": analysis.known, "warnings": analysis.warnings, "unreadable": bad}


def show_dataset(dataset: ReidDataset, analysis: Analysis, bad: Sequence[BadImage] | None) -> None:
    """Print the counts of a data set, warnings and, if they were decoded, unreadable images."""
    kinds = ("identities", "cameras", "images", "distractors", "junk")
    rows = [(name, *(f"{getattr(counts, kind):,}" for kind in kinds)) for name, counts in analysis.splits.items()]
    print_table(f"{dataset.root} · {dataset.layout}", ("", *kinds), rows)
    names = [f"{number} {name}" for number, name in [*dataset.reading.cameras.items()][:LISTED]]
    cameras = dataset.reading.camera_rule.value + f" ({', '.join(names)})" * bool(names)
    print_line(escape(printable(f"cameras: {cameras} · split: {dataset.reading.split_rule.value}")))
    for warning in analysis.warnings:
        print_line(f"[yellow]warning:[/] {escape(warning.text)}")
    _show_unreadable("unreadable", bad or [])
    if not analysis.warnings and not bad:
        print_line("[green]ok:[/] no problem found" + ("" if bad is None else "; every image can be read"))


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """Print what `pmm doctor` found."""
    from rich.table import Table

    colors = {"ok": "green", "limited": "yellow", "problem": "red", "info": "default"}
    table = Table(show_header=False, box=None)
    for name, found in (*diagnosis["checks"].items(), *diagnosis["commands"].items()):
        color = colors[found.status.value]
        remedy = f"\n[dim]{escape(printable(found.remedy))}[/]" if found.remedy else ""
        table.add_row(f"[{color}]{found.status.value}[/]", name, f"{escape(printable(found.detail))}{remedy}")
    out().print(table)
