"""Line charts: pictures that parse, whatever is drawn, and that tell lines apart."""

from xml.etree import ElementTree

import pytest

from toss_lightning.report.charts import BLIND, Axis, Line, Mark, Style, chart, styles_of

SVG = "{http://www.w3.org/2000/svg}"
ACROSS, UPWARD = Axis("step"), Axis("loss, nats")
PLAIN = Style("#0072B2", "")


def drawn(*lines: Line, across: Axis = ACROSS, upward: Axis = UPWARD, mark: Mark | None = None) -> ElementTree.Element:
    return ElementTree.fromstring(chart(lines, across, upward, mark))


def texts(picture: ElementTree.Element) -> list[str]:
    return [one.text or "" for one in picture.iter(f"{SVG}text")]


def points(picture: ElementTree.Element) -> list[list[tuple[float, float]]]:
    found = []
    for one in picture.iter(f"{SVG}polyline"):
        places = [place.split(",") for place in one.attrib["points"].split()]
        found.append([(float(x), float(y)) for x, y in places])
    return found


def test_titles_of_axes_and_names_of_lines_are_there() -> None:
    picture = drawn(Line("base", [(0, 1.0), (9, 2.0)], PLAIN), Line("TOSS", [(0, 2.0), (9, 1.0)], PLAIN))
    assert {"step", "loss, nats", "base", "TOSS"} <= {*texts(picture)}
    title = picture.find(f"{SVG}title")
    assert title is not None
    assert title.text == "loss, nats by step, for base, TOSS"


def test_higher_is_further_up_and_later_is_further_right() -> None:
    ((left, low), (right, high)), _ = points(
        drawn(Line("a", [(0, 1.0), (9, 2.0)], PLAIN), Line("b", [(0, 0.0)], PLAIN))
    )
    assert left < right
    assert low > high


def test_all_of_a_line_is_inside_the_picture() -> None:
    picture = drawn(Line("a", [(-3, -1e4), (2, 5.0), (7, 1e4)], PLAIN))
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    for x, y in points(picture)[0]:
        assert 0 < x < width
        assert 0 < y < height


def test_names_that_svg_would_take_for_its_own() -> None:
    name = '<b> & "that"'
    assert name in texts(drawn(Line(name, [(0, 1.0), (1, 2.0)], PLAIN), mark=Mark(0.5, "<here>")))


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
def test_a_flat_line_is_a_line(value: float) -> None:
    (line,) = points(drawn(Line("flat", [(1, value), (2, value)], PLAIN)))
    assert line[0][1] == line[1][1]
    drawn(Line("flat", [(1, 0.0), (2, 0.0)], PLAIN), upward=Axis("share", share=True, low=0))


def test_a_line_of_one_point_is_a_dot() -> None:
    assert len([*drawn(Line("one", [(1, 2.0)], PLAIN)).iter(f"{SVG}circle")]) == 1
    assert not [*drawn(Line("two", [(1, 2.0), (2, 2.0)], PLAIN)).iter(f"{SVG}circle")]


def test_shares_are_in_percent() -> None:
    found = texts(drawn(Line("a", [(0, 0.0), (1, 1.0)], PLAIN), upward=Axis("share", share=True, low=0)))
    assert {"0%", "20%", "100%"} <= {*found}
    assert "0.2" in found, "the other axis is not one of shares"


def test_values_below_zero_have_the_sign_of_mathematics() -> None:
    found = texts(drawn(Line("a", [(-4, 0.0), (4, 1.0)], PLAIN)))
    assert "−2" in found
    assert not any(one.startswith("-") for one in found)


def test_a_mark_stands_where_it_belongs_also_beyond_the_lines() -> None:
    for at in (0.5, 3.0):
        picture = drawn(Line("a", [(0, 1.0), (1, 2.0)], PLAIN), mark=Mark(at, "masked from here"))
        assert "masked from here" in texts(picture)
        (dashed,) = [one for one in picture.iter(f"{SVG}line") if one.get("stroke-dasharray") == "4 3"]
        assert 0 < float(dashed.attrib["x1"]) < float(picture.attrib["width"])


def test_every_line_is_in_the_legend_in_as_many_rows_as_it_takes() -> None:
    names = [f"a rather long name of label {at}" for at in range(7)]
    picture = drawn(
        *(Line(name, [(0, 1.0), (1, 2.0)], style) for name, style in zip(names, styles_of(names), strict=True))
    )
    placed = {one.text: (float(one.attrib["x"]), float(one.attrib["y"])) for one in picture.iter(f"{SVG}text")}
    assert {*names} <= {*placed}
    assert len({placed[name] for name in names}) == len(names)
    highest = min(y for line in points(picture) for _, y in line)
    assert max(placed[name][1] for name in names) < highest, "no name stands over a line"
    assert max(placed[name][0] for name in names) < float(picture.attrib["width"])


def test_a_very_long_name_is_shortened() -> None:
    (name,) = [one for one in texts(drawn(Line("x" * 300, [(0, 1.0), (1, 2.0)], PLAIN))) if one.startswith("xx")]
    assert name.endswith("…")
    assert len(name) < 60


def test_harmful_rows_have_one_colour_in_every_picture() -> None:
    first, second = styles_of(["harmful", "benign", "chat"]), styles_of(["benign", "harmful"])
    assert first[0].colour == second[1].colour
    assert len({one.colour for one in first}) == 3
    assert len({one.colour for one in second}) == 2


def test_lines_are_told_apart_without_colours() -> None:
    styles = [*styles_of(["a", "b", "c"]), BLIND]
    picture = drawn(*(Line(style.dashes, [(0, 1.0), (1, 2.0)], style) for style in styles))
    assert len({one.get("stroke-dasharray") for one in picture.iter(f"{SVG}polyline")}) == 4
