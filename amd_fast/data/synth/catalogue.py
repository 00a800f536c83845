"""Which classes exist: pairs of a motion program and an appearance, split so that no class is in two splits.

Classes come in blocks (programs x appearances). Two classes of a block that differ only in the direction of time have the same frames and
can only be told apart by motion; two that differ only in colours and texture move alike and can only be told apart by appearance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations

from amd_fast.data.synth.appearance import Appearance
from amd_fast.data.synth.programs import Program
from amd_fast.errors import ConfigError

SPLITS = ("train", "val", "test")
SHARES = {"train": 48, "val": 12, "test": 20}  # of the default 80 classes


@dataclass(frozen=True)
class ActionClass:
    """One class of the set."""

    program: Program
    look: Appearance
    split: str

    @property
    def label(self) -> str:
        """For example ``slide_reversed-disc_plain_red_red``."""
        return f"{self.program.name}-{self.look.name}"


Block = tuple[str, str, tuple[str, ...]]

# action/view, which way time runs ("+" forwards, "-" backwards, "+-" both), appearances. Blocks of two directions or two appearances
# are the confusable pairs. The order matters: a smaller set takes the first blocks of each split.
TRAIN: tuple[Block, ...] = (
    ("sit_down/above", "+-", ("slim plain red blue", "slim hoops white blue")),
    ("slide", "+-", ("disc plain red red", "disc checks blue white")),
    ("sit_down/side", "+-", ("stocky plain green brown",)),
    ("wave/side", "+", ("slim plain yellow black", "slim halves blue black")),
    ("walk/above", "+-", ("stocky plain black grey", "stocky hoops red white")),
    ("circle", "+-", ("star plain yellow yellow", "star stripes green black")),
    ("fall_forward/side", "+-", ("slim plain white black", "slim halves orange blue")),
    ("bend_down/side", "+-", ("robed plain red brown",)),
    ("lie_down/above", "+-", ("sleeveless plain blue grey",)),
    ("spin", "+-", ("bar stripes orange black",)),
    ("fall_side/above", "+", ("slim belted green white", "slim plain pink black")),
    ("grow", "+-", ("square dots white blue",)),
    ("squash", "+-", ("triangle plain green green",)),
    ("approach/side", "+-", ("child hoops yellow blue",)),
    ("pendulum", "+", ("hexagon plain blue blue", "hexagon halves red yellow")),
    ("drop", "+-", ("cross checks pink black",)),
    ("run/side", "+", ("sleeveless plain orange brown",)),
    ("jacks/side", "+", ("stocky belted blue white",)),
    ("roll_over/above", "+", ("slim plain grey black",)),
    ("squat/side", "+", ("robed halves white red",)),
    ("bounce", "+", ("disc rings green yellow",)),
    ("zigzag", "+", ("square stripes red white",)),
    # Beyond the default 48:
    ("fall_back/above", "+-", ("stocky plain white grey",)),
    ("walk/side", "+-", ("slim hoops green black",)),
    ("fall_forward/above", "+-", ("child plain blue black",)),
    ("walk_circle/above", "+-", ("slim plain red black",)),
    ("sit_up/side", "+-", ("sleeveless plain white blue",)),
    ("split", "+-", ("disc plain orange orange",)),
    ("topple", "+-", ("bar plain white white",)),
    ("jump/side", "+", ("slim plain blue white", "slim halves red white")),
    ("punch/side", "+", ("stocky plain red black", "stocky hoops white grey")),
    ("thrash/above", "+", ("slim plain black blue", "slim belted white green")),
    ("pulse", "+", ("star plain red red", "star rings white blue")),
    ("shake", "+", ("square checks green white", "square plain black black")),
    ("rock", "+", ("triangle stripes blue white", "triangle plain yellow yellow")),
    ("lie_down/side", "+-", ("stocky plain blue black",)),
    ("bend_down/above", "+-", ("slim plain green black",)),
    ("collapse/above", "+-", ("robed plain orange brown",)),
    ("kneel/side", "+-", ("slim halves green blue",)),
    ("march/above", "+", ("child plain red white", "child belted black orange")),
)
VAL: tuple[Block, ...] = (
    ("fall_back/side", "+-", ("child plain green blue", "child hoops purple white")),
    ("spiral", "+-", ("ellipse plain purple purple", "ellipse zigzag orange white")),
    ("turn_round/above", "+-", ("stocky halves grey red",)),
    ("hop", "+", ("hexagon dots brown yellow", "hexagon plain pink pink")),
    ("collapse/side", "+-", ("robed hoops blue white",)),
    ("march/side", "+", ("slim belted brown yellow", "slim plain purple grey")),
    ("stop_and_go", "+-", ("cross fade purple yellow",)),
    ("walk_circle/side", "+-", ("sleeveless hoops grey red",)),
)
TEST: tuple[Block, ...] = (
    ("crawl/side", "+-", ("hatted plain teal brown", "hatted hoops red yellow")),
    ("orbit", "+-", ("heart plain red pink", "heart zigzag teal white")),
    ("kick/side", "+", ("robed belted teal purple", "robed plain brown pink")),
    ("sit_down/side", "+-", ("hatted halves purple green",)),
    ("tumble", "+-", ("crescent dots purple white", "crescent plain teal teal")),
    ("raise_arms/side", "+-", ("sleeveless belted pink teal",)),
    ("figure_eight", "+", ("gear fade teal yellow", "gear rings brown white")),
    ("sidestep/side", "+-", ("stocky belted yellow purple",)),
    ("throw", "+-", ("arrow zigzag pink blue",)),
    ("dance/side", "+", ("hatted belted orange teal", "hatted plain grey purple")),
    ("crouch/above", "+-", ("hatted hoops blue pink",)),
    ("flip", "+", ("corner fade red teal", "corner rings purple yellow")),
    ("clap/side", "+", ("robed hoops teal brown", "robed halves pink grey")),
    ("sit_up/above", "+-", ("hatted plain yellow teal",)),
)
BLOCKS = {"train": TRAIN, "val": VAL, "test": TEST}


def _classes(split: str) -> Iterator[ActionClass]:
    for motion, directions, looks in BLOCKS[split]:
        action, _, view = motion.partition("/")
        for look in looks:
            for direction in directions:
                silhouette, texture, colour, second = look.split()
                yield ActionClass(Program(action, view, direction == "-"), Appearance(silhouette, texture, colour, second), split)


def catalogue(count: int = 80) -> tuple[ActionClass, ...]:
    """The first ``count`` classes, shared out over train, val and test as 48 : 12 : 20.

    Raises:
        ConfigError: fewer than 5 classes or more than there are.
    """
    available = {split: tuple(_classes(split)) for split in SPLITS}

    def possible(total: int) -> bool:
        return all(number <= len(available[split]) for split, number in _shares(total).items())

    if count < 5 or not possible(count):
        most = max(filter(possible, range(5, 200)))
        raise ConfigError(f"classes={count} is not possible: the synthetic set has 5 to {most} classes. Choose a number in that range.")
    wanted = _shares(count)
    return tuple(chain.from_iterable(available[split][: wanted[split]] for split in SPLITS))


def _shares(count: int) -> dict[str, int]:
    val, test = (round(count * SHARES[split] / sum(SHARES.values())) for split in ("val", "test"))
    return {"train": count - val - test, "val": val, "test": test}


def confusable_pairs(classes: tuple[ActionClass, ...]) -> dict[str, list[tuple[str, str]]]:
    """Pairs of labels of one split that differ only in motion (``motion_only``) or only in appearance (``appearance_only``).

    Motion-only pairs are time-reversed, so their sets of single frames are alike. Appearance-only pairs share the silhouette and the
    program and differ in colours and texture.
    """
    pairs: dict[str, list[tuple[str, str]]] = {"motion_only": [], "appearance_only": []}
    for one, other in combinations(classes, 2):
        if one.split != other.split:
            continue
        if one.look == other.look and one.program.reverse == other.program:
            pairs["motion_only"].append((one.label, other.label))
        elif one.program == other.program and one.look.silhouette == other.look.silhouette:
            pairs["appearance_only"].append((one.label, other.label))
    return pairs
