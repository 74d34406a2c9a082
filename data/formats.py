"""What data/ and tinytown/ share: words in their files, and how instructions are combined.

This file imports nothing, so that the toy world can use it without the rest of the project.
"""

KINDS = ("helpfulness", "safety")  # of reward models, and of the pairs that they learn from
RATINGS = ("significantly", "better", "slightly", "negligibly")  # how much better (§3.2.1)


def combine_instructions(rng, instructions: list[dict]) -> tuple[str, list[dict]]:
    """(text, its instructions): one instruction, or two of different kinds.

    Half of the texts use the terse form, so that a model learns both.
    """
    chosen = [rng.choice(instructions)]
    form = rng.choice(["instruction", "terse"])
    others = [other for other in instructions if other["kind"] != chosen[0]["kind"]]
    if others and rng.random() < 1 / 3:
        chosen.append(rng.choice(others))
    return " ".join(instruction[form] for instruction in chosen), chosen
