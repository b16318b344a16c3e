"""What a person sees at a terminal of 60, 80, 100 and 200 columns, and in which colours."""

import os
import re

import pytest

from tests.cli.command import Vmplug
from tests.cli.screen import WIDTHS, emulate, on_screen
from tests.support.journal import attach_row, device_record, vm_record
from tests.support.tree import HostTree
from vmplug.cli.render.table import Column, fit
from vmplug.cli.render.terminal import columns_of, shorten
from vmplug.host.process import read_start_time
from vmplug.host.root import THIS_HOST
from vmplug.journal.journal import Journal

DISK = "/srv/images/customers/production/database-01.raw"
CONTAINER = "3f4e9a1b2c5d6e7f8091a2b3c4d5e6f70819a2b3c4d5e6f708192a3b4c5d6e7f"


@pytest.fixture
def ids(vmplug: Vmplug) -> list[str]:
    """Two devices in a journal: of a container whose image has gone, and /dev/null's."""
    with Journal.open(vmplug.state_dir) as journal:
        pid = os.getpid()
        journal.add_vm(
            vm_record("sandbox-7f3a", pid=pid, started_at=read_start_time(pid, THIS_HOST))
        )
        image = device_record(f"file:{DISK}", DISK, vm="sandbox-7f3a")
        other = device_record("file:/dev/null", "/dev/null", vm="sandbox-7f3a")
        holds = [
            attach_row(journal, image, owner=CONTAINER),
            attach_row(journal, other),
        ]
    return [hold.id for hold in holds]


# list


@pytest.mark.parametrize("columns", WIDTHS)
def test_each_hold_is_one_row_of_list_with_its_id_whole(
    vmplug: Vmplug, ids: list[str], columns: int
) -> None:
    screen = on_screen(vmplug, "list", columns=columns)
    rows = [screen.row(id_) for id_ in ids]
    assert screen.rows[1:3] == tuple(rows)
    for row in rows:
        assert row.startswith("sandbox-7f3a  ")
        assert "attached" in row
    headings = screen.rows[0].split("  ")
    assert {"VM", "ATTACHMENT", "HOST PATH", "STATE"} <= {word.strip() for word in headings}


def test_a_wide_terminal_shows_all_of_list(vmplug: Vmplug, ids: list[str]) -> None:
    screen = on_screen(vmplug, "list", columns=240)
    assert screen.text == vmplug("list").answer().rstrip("\n")
    assert DISK in screen.row(ids[0])
    assert CONTAINER in screen.row(ids[0])


def test_list_says_what_a_narrow_terminal_has_no_room_for(vmplug: Vmplug, ids: list[str]) -> None:
    screen = on_screen(vmplug, "list", columns=80)
    headings = screen.rows[0]
    all_headings = re.split(r" {2,}", vmplug("list").answer().splitlines()[0])
    left_out = [heading for heading in all_headings if heading not in headings]
    assert screen.rows[3] == f"not shown: {', '.join(left_out)} (--json has all)"
    assert "OWNER" in headings
    assert "CONTAINER PATH" not in headings
    row = screen.row(ids[0])
    assert DISK not in row
    assert CONTAINER not in row
    path = row[headings.index("HOST PATH") : headings.index("STATE")].strip()
    start, end = path.split("...")
    assert DISK.startswith(start)
    assert DISK.endswith(end)
    owner = row[headings.index("OWNER") : headings.index("HOST PATH")].strip()
    start, end = owner.split("...")
    assert CONTAINER.startswith(start)
    assert CONTAINER.endswith(end)


def test_a_pipe_gets_all_of_every_column(vmplug: Vmplug, ids: list[str]) -> None:
    listed = vmplug("list").answer()
    assert DISK in listed
    assert "not shown" not in listed
    assert "\x1b" not in listed


def test_letters_of_two_columns_do_not_push_the_others_aside(vmplug: Vmplug) -> None:
    with Journal.open(vmplug.state_dir) as journal:
        journal.add_vm(vm_record())
        for path in ("/srv/イメージ/データベース.raw", "/srv/plain.raw"):
            attach_row(journal, device_record(f"file:{path}", path))
    screen = on_screen(vmplug, "list", columns=200)
    # The emulator gives a wide letter a second place, which stays empty in its text.
    starts = {columns_of(row[: row.index("rw")]) for row in screen.rows[1:3]}
    assert len(starts) == 1


# colours


def test_good_is_green_and_what_needs_somebody_is_red(vmplug: Vmplug, ids: list[str]) -> None:
    screen = on_screen(vmplug, "list", columns=100)
    assert screen.colour_of("attached") == "green"
    assert screen.colour_of("deleted") == "red"
    assert screen.colour_of(ids[0]) == "default"


def test_check_colours_ok_warnings_and_errors(vmplug: Vmplug, tree: HostTree) -> None:
    tree.block_device("8:16", "sdb").block_device("8:32", "sdc").block_device("8:48", "sdd")
    tree.mount("/dev/sdb", "/srv", "8:16")
    tree.mount("/dev/sdc", "/srv/a", "8:32")
    tree.swap("/dev/sdc")
    asked = [word for number in ("8:16", "8:32", "8:48") for word in ("-d", f"b:{number}")]
    words = ("check", *asked, "--root", str(tree.path), "--allow", "mounted-on-host")
    screen = on_screen(vmplug, *words, columns=100)
    assert screen.colour_of("ok") == "green"
    assert screen.colour_of("warning") == "brown"  # the emulator's word for yellow
    assert screen.colour_of("error") == "red"
    assert screen.colour_of("mounted-on-host") == "default"


def test_an_event_of_watch_has_the_colour_of_what_it_means(vmplug: Vmplug, ids: list[str]) -> None:
    screen = on_screen(vmplug, "watch", "--timeout", "0", columns=80)
    assert screen.colour_of("deleted") == "red"


@pytest.mark.parametrize(
    ("env", "is_coloured"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True),
    ],
    ids=str,
)
def test_a_terminal_gets_colours_where_they_are_wanted(
    vmplug: Vmplug, ids: list[str], env: dict[str, str], *, is_coloured: bool
) -> None:
    shown = vmplug.at_terminal("list", columns=100, env=env).stdout
    assert ("\x1b" in shown) is is_coloured
    assert (emulate(shown, 100).colour_of("attached") == "green") is is_coloured


def test_a_pipe_gets_colours_when_they_are_asked_for(vmplug: Vmplug, ids: list[str]) -> None:
    assert "\x1b" not in vmplug("list").answer()
    forced = vmplug("list", env={"FORCE_COLOR": "1"}).answer()
    assert emulate(forced, 240).colour_of("attached") == "green"
    assert emulate(forced, 240).text == vmplug("list").answer().rstrip("\n")
    assert "\x1b" not in vmplug("list", "--json", env={"FORCE_COLOR": "1"}).stdout


def test_an_error_is_red_where_stderr_wants_colours(vmplug: Vmplug) -> None:
    asked = ("list", "--vm", "sb9")
    assert "\x1b" not in vmplug(*asked).stderr
    stderr = emulate(vmplug(*asked, env={"FORCE_COLOR": "1"}).stderr, 100)
    assert stderr.colour_of("vmplug:") == "red"
    assert "\x1b" not in vmplug(*asked, "--json", env={"FORCE_COLOR": "1"}).stderr


# sentences and trees


@pytest.fixture
def host(tree: HostTree) -> HostTree:
    """A host with a disk that is mounted below a long path, and an image behind a loop device."""
    tree.block_device("8:16", "sdb", partitions={"8:17": "sdb1"})
    loop = {"backing_file": f"{DISK}\n", "offset": "0\n", "sizelimit": "0\n"}
    tree.block_device("7:0", "loop0", loop=loop)
    return tree.mount("/dev/sdb1", "/srv/images/customers/production", "8:17")


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(
    "words",
    [
        ("check", "-d", "b:8:16:/dev/xvda", "-d", "b:8:17:/dev/xvdb", "-d", "b:8:99:/dev/xvdc"),
        ("host",),
        ("host", "/dev/sdb"),
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_sentences_break_at_words_and_lose_none(
    vmplug: Vmplug, host: HostTree, words: tuple[str, ...], columns: int
) -> None:
    asked = (*words, "--root", str(host.path))
    assert on_screen(vmplug, *asked, columns=columns).text.split() == vmplug(*asked).stdout.split()


@pytest.mark.parametrize("columns", WIDTHS)
def test_watch_breaks_at_words_and_loses_none(
    vmplug: Vmplug, ids: list[str], columns: int
) -> None:
    screen = on_screen(vmplug, "watch", "--timeout", "0", columns=columns)
    assert ids[0] in screen.text.split()
    # The terminal breaks an id that is longer than its lines.
    shown, piped = (
        "".join(re.sub(r"\d\d:\d\d:\d\d", "", text).split())
        for text in (screen.text, vmplug("watch", "--timeout", "0").answer())
    )
    assert CONTAINER in shown
    assert shown == piped


def test_what_follows_in_a_narrow_terminal_stands_below_what_it_is_about(
    vmplug: Vmplug, host: HostTree
) -> None:
    asked = ("check", "-d", "b:8:17:/dev/xvdb", "--root", str(host.path))
    first, *others = on_screen(vmplug, *asked, columns=60).rows
    assert first.startswith("/dev/xvdb: error mounted-on-host: ")
    assert others
    assert all(row.startswith(" " * 11) and row[11] != " " for row in others)


# the rule itself


def test_columns_of_the_lowest_rank_stay() -> None:
    columns = [Column("ID"), Column("PATH", 1, least=10), Column("A", 3), Column("B", 2)]
    natural = [16, 40, 8, 8]
    assert fit(columns, natural, None) == {0: 16, 1: 40, 2: 8, 3: 8}
    assert fit(columns, natural, 78) == {0: 16, 1: 40, 2: 8, 3: 8}
    assert fit(columns, natural, 77) == {0: 16, 1: 39, 2: 8, 3: 8}
    assert fit(columns, natural, 48) == {0: 16, 1: 10, 2: 8, 3: 8}
    assert fit(columns, natural, 47) == {0: 16, 1: 19, 3: 8}
    assert fit(columns, natural, 30) == {0: 16, 1: 12}
    assert fit(columns, natural, 20) == {0: 16}
    assert fit(columns, natural, 5) == {0: 16}


@pytest.mark.parametrize("path", [DISK, "/srv/イメージ/データベース-01.raw", "/e\u0301" * 20])
def test_a_shortened_path_has_its_ends_and_fits(path: str) -> None:
    for width in range(8, columns_of(path)):
        short = shorten(path, width)
        start, end = short.split("...")
        assert path.startswith(start)
        assert path.endswith(end)
        assert width - 2 <= columns_of(short) <= width  # at either end a wide letter may not fit
        assert columns_of(end) >= columns_of(start)
    assert shorten(path, columns_of(path)) == path
