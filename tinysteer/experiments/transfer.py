"""Transfer: a model steered by vectors of its instruction-tuned sibling (paper, section 7)."""

from tinysteer.experiments.formats import NOTE, accuracies, test_items
from tinysteer.experiments.instructions import all_instructed, choose_layers
from tinysteer.experiments.report import Findings
from tinysteer.experiments.study import Study
from tinysteer.experiments.texts import of_instruction


def run(study: Study) -> Findings:
    """Vectors and targets of `study.source`, against those of the model itself."""
    assert study.source is not None
    items = test_items(study)
    wanted, ways, validated = list(of_instruction(items)), {}, []
    for name, model in (("cross", study.source), ("own", study.model)):
        vectors = all_instructed(study, model)
        source = model.name if model is study.source else None
        layers, rows = choose_layers(study, vectors, wanted, source)
        ways[name] = (vectors, layers)
        validated += [{"vectors": name} | row for row in rows]
    notes = [NOTE, f"cross: vectors and targets of {study.source.name}; own: of the model itself."]
    layers = {name: way[1] for name, way in ways.items()}
    return Findings(
        accuracies(study, items, ways), notes, {"layers": layers, "validation": validated}
    )
