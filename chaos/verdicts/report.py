"""What a run has found, for people (Markdown, one HTML page) and for machines (JSON, JUnit)."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from chaos.record.history import Event, RunBegan
from chaos.verdicts.fault_outcomes import FaultOutcome
from chaos.verdicts.judgement import RunJudgement
from chaos.verdicts.verdict import State

EXIT_STATUS = {State.HELD: 0, State.BROKEN: 1, State.UNKNOWN: 3}
COULD_NOT_RUN = 2


@dataclass(frozen=True, slots=True)
class Report:
    """One judged run. `events` are those that were judged."""

    events: Sequence[Event]
    judgement: RunJudgement

    @property
    def began(self) -> RunBegan:
        return next(event for event in self.events if isinstance(event, RunBegan))

    @property
    def title(self) -> str:
        began = self.began
        return f"{began.suite} on {began.target}, seed {began.seed}: {self.judgement.state}"

    def write(self, folder: Path) -> None:
        """Writes report.md, report.html, timeline.png, report.json and junit.xml."""
        # Matplotlib takes a second to import; a user who only asks for help should not wait for it.
        from chaos.verdicts.timeline_picture import timeline_png

        picture = timeline_png(self.events, self.judgement.outcomes, self.title)
        (folder / "timeline.png").write_bytes(picture)
        (folder / "report.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "report.html").write_text(self.page(picture), encoding="utf-8")
        (folder / "report.json").write_text(self.json(), encoding="utf-8")
        (folder / "junit.xml").write_text(self.junit(), encoding="utf-8")

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Returns (heading, columns, rows) of everything that a page shows."""
        judgement = self.judgement
        verdicts = [[v.name, v.state.value, "; ".join(v.evidence) or v.sentence] for v in judgement.verdicts]
        faults = [_fault_row(outcome) for outcome in judgement.outcomes]
        figures = [[name, f"{value:.6g}"] for v in judgement.verdicts for name, value in sorted(v.figures.items())]
        figures.append(["usual_longest_gap_s", f"{judgement.usual_gap_s:.6g}"])
        figures.append(["usual_tpot_p99_ms", f"{judgement.usual_tpot_s * 1000:.6g}"])
        left_out = [[str(s.fault) if s.fault >= 0 else "all", s.kind, s.reason] for s in judgement.skipped]
        return [
            ("Verdicts", ["invariant", "verdict", "why"], verdicts),
            ("Faults", list(faults[0]) if faults else [], [list(row.values()) for row in faults]),
            ("Left out", ["fault", "kind", "why"], left_out),
            ("Figures", ["figure", "value"], figures),
        ]

    def markdown(self) -> str:
        """Returns the report for a terminal; it ends with the hashes."""
        parts = [f"# {self.title}", "", f"Model {self.began.model}.", "", "![timeline](timeline.png)", ""]
        for heading, columns, rows in self.tables():
            if rows:
                lines = [columns, ["---"] * len(columns), *rows]
                parts += [f"## {heading}", "", *("| " + " | ".join(map(_cell, line)) + " |" for line in lines), ""]
        return "\n".join([*parts, *self._hash_lines(), ""])

    def page(self, picture: bytes) -> str:
        """Returns the report as one page that needs nothing else."""
        encoded = base64.b64encode(picture).decode()
        parts = [
            "<!doctype html><html lang='en'><meta charset='utf-8'>",
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style>",
            f"<h1>{html.escape(self.title)}</h1><p>Model {html.escape(self.began.model)}.</p>",
            f"<img alt='timeline' src='data:image/png;base64,{encoded}'>",
        ]
        for heading, columns, rows in self.tables():
            if rows:
                head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
                body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
                parts.append(f"<h2>{heading}</h2><table><tr>{head}</tr>{body}</table>")
        parts += [f"<p><code>{html.escape(line)}</code></p>" for line in self._hash_lines() if line]
        return "\n".join(parts)

    def json(self) -> str:
        """Returns verdicts, faults and figures with their names."""
        judgement = self.judgement
        document = {
            **{name: value for name, value in asdict(self.began).items() if name != "at_s"},
            "state": judgement.state,
            "verdicts": [asdict(verdict) for verdict in judgement.verdicts],
            "faults": [asdict(outcome) for outcome in judgement.outcomes],
            "left_out": [asdict(skipped) for skipped in judgement.skipped],
            "throughput": asdict(judgement.throughput),
            "usual_longest_gap_s": judgement.usual_gap_s,
            "usual_tpot_p99_s": judgement.usual_tpot_s,
            "sha256_with_faults": judgement.sha256_with_faults,
            "sha256_without_faults": judgement.sha256_without_faults,
        }
        return json.dumps(document, indent=2) + "\n"

    def junit(self) -> str:
        """Returns a test case for each verdict: broken is a failure, unknown an error."""
        verdicts = self.judgement.verdicts
        suite = ElementTree.Element(
            "testsuite",
            name=f"chaos.{self.began.suite}",
            tests=str(len(verdicts)),
            failures=str(sum(v.state is State.BROKEN for v in verdicts)),
            errors=str(sum(v.state is State.UNKNOWN for v in verdicts)),
        )
        for verdict in verdicts:
            case = ElementTree.SubElement(suite, "testcase", classname=f"chaos.{self.began.suite}", name=verdict.name)
            if verdict.state is not State.HELD:
                tag = "failure" if verdict.state is State.BROKEN else "error"
                ElementTree.SubElement(case, tag, message=verdict.sentence).text = "\n".join(verdict.evidence)
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

    def _hash_lines(self) -> list[str]:
        return [
            f"SHA-256 of all token ids without faults: {self.judgement.sha256_without_faults}",
            "",
            f"SHA-256 of all token ids with faults:    {self.judgement.sha256_with_faults}",
        ]


_STYLE = (
    "body{font:15px/1.4 system-ui,sans-serif;margin:2em;max-width:110em}img{max-width:100%}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left;vertical-align:top}"
    ".held{background:#dff0d8}.broken{background:#f2c4c0}.unknown{background:#fbe9bf}"
)


def _fault_row(outcome: FaultOutcome) -> dict[str, str]:
    """Returns the cells by column."""
    return {
        "fault": str(outcome.number),
        "at s": f"{outcome.applied_s:.1f}",
        "kind": outcome.kind,
        "victims": ", ".join(node.name for node in outcome.victims),
        "roles": ", ".join(role or node.kind for role, node in zip(outcome.roles, outcome.victims, strict=False)),
        "streams": str(outcome.num_streams),
        "extra gap p50 s": f"{outcome.gap_p50_s:.2f}",
        "p99 s": f"{outcome.gap_p99_s:.2f}",
        "tokens again s": f"{outcome.tokens_again_s:.2f}",
        "tpot p99 ms": f"{outcome.tpot_p99_s * 1000:.0f}",
        "whole s": "never" if outcome.recovery_s is None else f"{outcome.recovery_s:.1f}",
        "remark": outcome.remark,
        "doubts": "; ".join(outcome.doubts),
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html_cell(text: str) -> str:
    mark = f" class='{text}'" if text in set(State) else ""
    return f"<td{mark}>{html.escape(text)}</td>"
