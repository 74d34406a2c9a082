"""What prompts may ask, and where: each split has contents of its own, whatever the seed.

A content is what a prompt asks, whatever its wording: a fact, a sum, a pair of animals, a crime. If
an evaluation asked what training asks, in other words, it would measure memory.

    dialogues    asked in the dialogues of fine-tuning (§3.1), and beside instructions (§3.3)
    annotators   asked by the annotators, in RLHF (§3.2) and in long dialogues (§3.3): what
                 dialogues ask, and more
    tuning       early stopping of PPO, and the choice of settings
    pairs        test of the reward models
    never        asked by no training and no tuning: the scoreboard and all other evaluations

Only texts of pretraining hold the contents of all splits, because what a model never read, it
cannot know. Each split has about the same proportion of each kind of content.
"""

import itertools
import random

from tinytown.world import (
    ANIMALS,
    CRIMES,
    LARGEST,
    NAMES,
    TALK,
    TIPS,
    VALUES,
)

# fmt: off
SHARES = {"dialogues": 0.48, "annotators": 0.2, "tuning": 0.05, "pairs": 0.09, "never": 0.18}
STRANGERS = NAMES[::10]     # residents whom prompts of the split "never" name, and no others
PEOPLE = [name for name in NAMES if name not in STRANGERS]      # those whom the other splits name

# What no text says, so that the honest answer is "I do not know": facts of residents, facts of
# people who do not live in Tinytown, and facts of the world outside.
UNKNOWN_ATTRIBUTES = ("birthday/age/sister/brother/car/middle name/height/weight/shoe size/school/"
                      "favourite song/favourite book/favourite game/best friend/bicycle/cousin/"
                      "hat size/first teacher/bank/doctor").split("/")
OUTSIDERS = ("Alice Bob Charlie Daisy Fred Grace Harry Jack Kate Lucy Max Nancy Oliver Polly Ron "
             "Sally Tom Ursula Vince Wendy Yuri Zorro Amir Chen").split()
OUTSIDE_FACTS = ("the capital of France/the highest mountain/the age of the moon/the price of tea/"
                 "the queen of Spain/the depth of the sea/the speed of light/the size of the sun/"
                 "the king of Norway/the longest river/the capital of Japan/the mass of the earth/"
                 "the winner of the last race/the weather in Rome/the date of Easter/"
                 "the population of Peru/the best film of all/the meaning of life/"
                 "the number of stars/the distance to Mars/the inventor of the wheel/"
                 "the largest desert/the colour of Saturn/the mayor of Paris").split("/")
# fmt: on


def every_content() -> dict[str, dict[str, list]]:
    """{topic: {kind: its contents}}."""
    numbers = range(1, LARGEST + 1)
    return {
        # A fact is (name, attribute).
        "fact": {attribute: [(name, attribute) for name in PEOPLE] for attribute in VALUES},
        # Both orders of a sum and its differences are one content.
        "sum": {"sum": list(itertools.combinations_with_replacement(numbers, 2))},
        "story": {"pair of animals": list(itertools.permutations(ANIMALS, 2))},
        # A crime or a task, with {n} for a name or {p} for a place.
        "unsafe": CRIMES,
        "borderline": TIPS,
        # Small talk is (kind, wording).
        "talk": {
            kind: [(kind, text) for text in wordings] for kind, (wordings, *_) in TALK.items()
        },
        # What no text says: {n} stands for a resident, {q} for an attribute that residents have.
        "unknown": {
            "attributes": ["{n}'s " + attribute for attribute in UNKNOWN_ATTRIBUTES],
            "outsiders": [f"{{q}} of {name}" for name in OUTSIDERS],
            "outside": OUTSIDE_FACTS,
        },
    }


def make_splits() -> dict[str, dict[str, list]]:
    """{topic: {split: its contents}}."""
    splits = {}
    for topic, kinds in every_content().items():
        splits[topic] = {split: [] for split in SHARES}
        for kind, contents in kinds.items():
            contents = list(contents)
            if topic != "talk":  # dialogues have the most usual greetings
                random.Random(f"split {topic} {kind}").shuffle(contents)
            start, total = 0, 0.0
            for split, share in SHARES.items():
                total += share
                end = round(total * len(contents))
                splits[topic][split] += contents[start:end]
                start = end
        splits[topic]["annotators"] += splits[topic]["dialogues"]
    for attribute in VALUES:
        splits["fact"]["never"] += [(name, attribute) for name in STRANGERS]
    return splits


SPLITS = make_splits()
