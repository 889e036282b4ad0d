from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sttp_manifold.experiments.reading.style import Look, legend


@pytest.mark.parametrize("width", [3.0, 7.0, 10.4])
@pytest.mark.parametrize("count", [1, 2, 5, 12, 13])
def test_a_legend_is_within_its_figure(count, width):
    figure = Figure(figsize=(width, 5), layout="constrained")
    figure.subplots()
    looks = [Look("#000000", "-", "o", f"SVDP Riemannian, Adam {k}") for k in range(count)]
    legend(figure, looks)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (drawn,) = figure.legends
    box = drawn.get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert [text.get_text() for text in drawn.get_texts()] == [look.label for look in looks]


def test_two_methods_of_each_kind_are_above_each_other_where_there_is_room():
    figure = Figure(figsize=(10, 5), layout="constrained")
    legend(figure, [Look("#000000", "-", "o", name) for name in "abcd"])
    assert figure.legends[0]._ncols == 2
