"""What the files between the stages agree on. It imports nothing, so Tinytown can use it, too."""

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
