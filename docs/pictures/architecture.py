"""Draws `architecture-light.svg` and `architecture-dark.svg`: python docs/pictures/architecture.py. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 980, 492
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    """The colours of one picture."""

    name: str
    background: str
    plane: str
    box: str
    border: str
    text: str
    muted: str
    arrow: str
    hot: str


THEMES = (
    Theme("light", "#ffffff", "#f6f8fa", "#ffffff", "#8c959f", "#1f2328", "#59636e", "#0969da", "#bc4c00"),
    Theme("dark", "#0d1117", "#151b23", "#212830", "#656c76", "#f0f6fc", "#9198a1", "#4493f8", "#f0883e"),
)


class Picture:
    """SVG elements in the order in which they are drawn."""

    def __init__(self, theme: Theme) -> None:
        self.theme = theme
        self._parts: list[str] = []

    def plane(self, y: int, height: int, title: str, title_y: int) -> None:
        """A band across the picture; its title's baseline is at `title_y`."""
        t = self.theme
        self._parts.append(
            f'<rect x="10" y="{y}" width="{WIDTH - 20}" height="{height}" rx="10" fill="{t.plane}" '
            f'stroke="{t.border}" stroke-opacity="0.4"/>'
        )
        self.text(26, title_y, title, size=13, fill=t.muted, weight=600)

    def box(
        self, x: int, y: int, width: int, height: int, title: str, lines: tuple[str, ...] = (), stroke: str = ""
    ) -> None:
        """A rounded box with a title and lines below it, centred."""
        t = self.theme
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{t.box}" '
            f'stroke="{stroke or t.border}" stroke-width="1.3"/>'
        )
        top = y + height / 2 - 8 * len(lines) + 5
        self.text(x + width / 2, top, title, size=15, weight=600, anchor="middle")
        for number, line in enumerate(lines, 1):
            self.text(x + width / 2, top + 17 * number, line, size=12, fill=t.muted, anchor="middle")

    def text(
        self, x: float, y: float, words: str, *, size: int, fill: str = "", weight: int = 400, anchor: str = "start"
    ) -> None:
        """One line of text; `y` is its baseline."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
            f'fill="{fill or self.theme.text}">{escape(words)}</text>'
        )

    def arrow(self, x1: int, y1: int, x2: int, y2: int, label: tuple[str, ...] = (), *, control: bool = False) -> None:
        """A line with a head at its end; `label` stands above it, or beside it where it is vertical."""
        colour = self.theme.muted if control else self.theme.arrow
        dash = ' stroke-dasharray="4 3"' if control else ""
        head = "control" if control else "data"
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.6"{dash} '
            f'marker-end="url(#{head})"/>'
        )
        for number, line in enumerate(label):
            if x1 == x2:
                self.text(x1 + 8, (y1 + y2) / 2 - 4 + 14 * number, line, size=11, fill=self.theme.muted)
            else:
                y = y1 - 8 - 14 * (len(label) - 1 - number)
                self.text((x1 + x2) / 2, y, line, size=11, fill=self.theme.muted, anchor="middle")

    def svg(self) -> str:
        """The whole file."""
        t = self.theme
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
            for name, colour in (("data", t.arrow), ("control", t.muted))
        )
        title = "Moiety: client, gateway, router and expert groups on the data plane; Redis, Ray Serve and OTLP below"
        body = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="{FONT}">\n'
            f"<title>{title}</title>\n<defs>{heads}</defs>\n"
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{t.background}"/>\n{body}\n</svg>\n'
        )


def draw(theme: Theme) -> str:
    """The architecture as SVG."""
    p = Picture(theme)
    p.plane(12, 258, "Data plane: every token", 36)
    p.plane(290, 190, "Control plane: no token passes here", 466)

    p.box(26, 108, 84, 70, "Client")
    p.box(196, 92, 180, 102, "Gateway", ("tokenises, streams text,", "resumes a request whose", "router is lost"))
    p.box(460, 92, 160, 102, "Router", ("attention, gating,", "KV cache, sampling,", "continuous batching"))
    p.arrow(110, 143, 194, 143, ("gRPC", "text"))
    p.arrow(376, 143, 458, 143, ("gRPC", "token ids"))

    groups = (("experts-0", 1, False), ("experts-1", 3, True), ("experts-2", 1, False), ("hot-0", 1, True))
    for number, (name, replicas, hot) in enumerate(groups):
        y = 46 + 54 * number
        colour = theme.hot if hot else theme.border
        for replica in reversed(range(replicas)):
            p.box(790 + 7 * replica, y - 4 * replica, 150, 40, "" if replica else name, stroke=colour)
        p.arrow(620, 143 - 21 + 14 * number, 786, y + 20)
    p.text(590, 48, "hidden rows: shared memory on", size=11, fill=theme.muted)
    p.text(590, 62, "one node, gRPC elsewhere", size=11, fill=theme.muted)
    p.text(560, 236, "one deployment per expert group;", size=11, fill=theme.muted)
    p.text(560, 250, "a hot one has more replicas", size=11, fill=theme.hot)

    p.box(
        40,
        350,
        270,
        92,
        "Redis",
        ("where every replica is,", "how hot every expert runs,", "which deployment holds which experts"),
    )
    p.box(
        366,
        350,
        276,
        92,
        "Ray Serve",
        (
            "starts, replaces, scales and upgrades",
            "the replicas of each deployment,",
            "by a policy that states its reasons",
        ),
    )
    p.box(700, 350, 240, 92, "OpenTelemetry (OTLP)", ("traces from client to kernel,", "metrics of every service"))
    p.arrow(190, 272, 190, 347, ("heartbeats,", "load counters"), control=True)
    p.arrow(140, 348, 140, 273, ("table",), control=True)
    p.arrow(504, 348, 504, 273, ("replicas",), control=True)
    p.arrow(820, 272, 820, 347, ("spans, metrics",), control=True)
    return p.svg()


def main() -> None:
    """Writes both pictures beside this file."""
    for theme in THEMES:
        Path(__file__).with_name(f"architecture-{theme.name}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
