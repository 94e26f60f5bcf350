"""`pmm calibrate`: find the decision thresholds of a model on a data set, and write them into its checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path

from pmm_edge.bench.charts import check_plot, save_threshold_plot
from pmm_edge.console import Report, printable, silent
from pmm_edge.data.checks import warn_of_choices
from pmm_edge.data.dataset import data_sha256, scan, warn_ignored
from pmm_edge.errors import DataError
from pmm_edge.files import check_place
from pmm_edge.retrieval.thresholds import FoundThresholds, People, refused_rates
from pmm_edge.runs import data_of, resolve_checkpoint, run_of
from pmm_edge.runtime import load
from pmm_edge.runtime.certificate import certificate_path, open_model
from pmm_edge.runtime.embed_files import dataset_thresholds, embed_dataset
from pmm_edge.spec import Calibration

CHECKPOINTS = (".pt", ".pth")


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """What `calibrate` found, and what it changed."""

    model: Path
    found: FoundThresholds
    written: bool  # into the spec of the model, which is a checkpoint
    before: Calibration | None  # what its spec contained before
    stale_certificate: Path | None  # of the checkpoint, which has changed


def calibrate(
    model: str | Path | None = None,
    data: str | Path | None = None,
    *,
    layout: str | None = None,
    out: str | Path | None = None,
    device: str | int | None = None,
    report: Report = silent,
) -> CalibrationResult:
    """Find decision thresholds: the distances up to which two images show the same person.

        result = pmm_edge.calibrate("best.pt", "market1501")
        result.found.calibration.threshold(fmr=1e-3).distance

    Only a checkpoint is changed, atomically: exports get its thresholds from `export`. For an exported model the result
    has its own thresholds, and the file keeps its digest and certificate.

    Args:
        model: a file that `load` accepts or a run folder; the newest run by default.
        data: a data set, of `layout` if that is not detected; by default that of the model's run. Its query and gallery
            should show people that the training did not see, in front of the cameras of the deployment.
        out: a .png or .svg file for the ROC and DET curves and the histograms of distances.

    Raises ModelError or DataError if the model or the data set cannot be used, also if it has too few people or pairs
    (see `find_thresholds`), and OutputError if a file cannot be written.
    """
    path = resolve_checkpoint(Path(model) if model else None)
    if data is None and run_of(path) is None:
        raise DataError(f"{path} is not in a run folder, so its data set is unknown", "Name the data set")
    source, layout = data_of(path, Path(data) if data else None, layout)
    dataset, is_checkpoint = scan(source, layout, training=False), path.suffix in CHECKPOINTS
    warn_ignored(source, dataset.ignored)
    warn_of_choices(dataset)
    if out:
        check_plot(Path(out))
    if is_checkpoint:
        check_place(path)
    file = open_model(path)
    embedder, judged = load(file, device), dataset.without_junk()
    refused_rates(People(*judged.labels))  # before all the work
    embedded = embed_dataset(embedder, judged, report=report)
    digest = data_sha256([*dataset.query.paths, *dataset.gallery.paths], dataset.root, report)
    found = dataset_thresholds(judged, embedded.embeddings, digest, report)
    if out:
        save_threshold_plot(Path(out), printable(f"{dataset.name} · {path.name}"), found)
    if is_checkpoint:
        from pmm_edge.model.checkpoint import load_checkpoint, save_checkpoint

        checkpoint = load_checkpoint(path, file.content)
        trained = checkpoint.spec.checkpoint_sha256 or file.sha256  # by which earlier exports and galleries know it
        spec = replace(checkpoint.spec, calibration=found.calibration, checkpoint_sha256=trained)
        save_checkpoint(path, replace(checkpoint, spec=spec))
    certificate = certificate_path(path)
    stale = certificate if is_checkpoint and certificate.exists() else None
    return CalibrationResult(path, found, is_checkpoint, embedder.spec.calibration, stale)
