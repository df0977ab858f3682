"""Pictures of a bench's lines: what moves cost above none, and how near a copy they come."""

from collections.abc import Iterable


def plot(lines: Iterable[dict], file: str) -> None:
    """Left: us above "no edits" by K, of one position a row. Right: percent of a copy by bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    above, share = {}, {}
    shown = [line for line in lines if line["way"] == line["kind"] and line["fused"]]
    for line in shown:
        if line["kind"] in ("adds", "targets", "mixed") and line["T"] == 1 and line["first"]:
            name = f"{line['kind']}, B {line['B']}, D {line['D']}, {line['directions']}"
            points = above.setdefault(name, {})  # of other types or arguments come later: left out
            points.setdefault(line["K"], (line["more"], line["low"], line["high"]))
        share.setdefault(line["kind"], []).append((line["bytes"], line["percent"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for name, by_k in sorted(above.items()):
        K, values = sorted(by_k), [by_k[k] for k in sorted(by_k)]
        errors = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
        left.errorbar(K, [v[0] for v in values], yerr=errors, marker="o", capsize=3, label=name)
    left.axhline(0, color="grey", linewidth=0.8)
    left.set(xlabel="moves a row, K", ylabel="us above no edits", title="add, moves, norm")
    for kind, points in share.items():
        right.scatter(*zip(*sorted(points), strict=True), s=16, label=kind)
    right.set(xscale="log", ylim=(0, None), ylabel="percent of a copy")
    right.set_xlabel("bytes that must move")
    right.set_title(", ".join({f"{line['device']}, {line['date']}" for line in shown}))
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small", ncols=1 + (len(above) > 12) * (axes is left))
    figure.savefig(file, dpi=120)
    plt.close(figure)
