"""Tinytown's instructions (§3.3), safety pre-prompts (§4.2), and conversations of many turns.

Instructions have a rule that tells whether an answer obeys them. Tests have other instructions,
other contents and other wordings than training.
"""

import itertools
import random

from data.formats import combine_instructions
from tinytown.prompts import (
    any_refusal,
    follow_up_text,
    good_answer,
    make_messages,
    make_prompt,
    same_resident,
)
from tinytown.splits import PEOPLE
from tinytown.world import ANIMALS

# fmt: off
# kind -> (values of {v}, wordings, terse wording, how to obey with an answer {a}, the rule's regex)
# No strangers: a name that only instructions had would be taken for a part of an instruction.
INSTRUCTIONS = {
    "animal": (ANIMALS, ["Always answer as the {v}.", "You are the {v}, answer like that.",
                         "Play the {v} in all your answers."],
               "Be the {v}.", "The {v} says: {a}", r"The {v} says: ?"),
    "hobby": (ANIMALS, ["You love the {v}, say so in every answer.", "Always mention that you love "
                        "the {v}.", "Say how you love the {v} in all your answers."],
              "Love the {v}.", "I love the {v}. {a}", r"I love the {v}\. ?"),
    "greeting": (PEOPLE, ["Always greet {v} first.", "Begin each answer with a word to {v}.",
                         "Talk to {v} in all your answers."],
                 "Greet {v}.", "Dear {v}, {a}", r"Dear {v}, ?"),
    "thanks": (PEOPLE, ["Always thank {v} first.", "Give thanks to {v} in each answer.",
                       "Thank {v} in all your answers."],
               "Thank {v}.", "Thank you, {v}. {a}", r"Thank you, {v}\. ?"),
}
ADJECTIVES = ("responsible respectful wise safe careful thoughtful honest kind prudent decent "
              "considerate sensible").split()           # of the safety pre-prompts
ACKNOWLEDGEMENT = "All right. What would you like to know?"     # of an instruction alone
STOPS = ["Stop that.", "Stop answering like that.", "Please stop it now.", "No more of that.",
         "Enough of that.", "Stop doing that.", "That is enough.", "You can stop now.",
         "Stop this.", "Please stop.", "Stop now.", "Stop, please.", "No more, please.",
         "You may stop now.", "Stop talking like that.", "Please answer as before.",
         "Do not do that any more.", "Please do not do that.", "I have had enough of that.",
         "Let us stop that.", "That will do.", "Quit that.", "End that now.", "Leave that out now."]
HELD_OUT_STOPS = ["Please stop that.", "Stop it."]
TOPICS_OF_TURNS = {"fact": 4, "sum": 4, "story": 1, "borderline": 1, "unsafe": 1, "talk": 1,
                   "unknown": 1}      # topic -> its weight in dialogues of many turns
TRAINED_KINDS, HELD_OUT_KINDS = ("animal", "hobby", "greeting"), ("thanks",)   # of Ghost Attention
# fmt: on


def instructions(kinds=tuple(INSTRUCTIONS), held_out: bool = False) -> list[dict]:
    """[{"kind", "instruction", "terse", "obeyed_if": [regex], "answer"}, ...] of these kinds.

    Every fifth value is held out: no dialogue and no Ghost Attention data has it.
    """
    records = []
    for kind in kinds:
        values, wordings, terse, answer, rule = INSTRUCTIONS[kind]
        for i, value in enumerate(values):
            if (i % 5 == 4) != held_out:
                continue
            for wording in wordings:
                record = {
                    "kind": kind,
                    "instruction": wording.format(v=value),
                    "terse": terse.format(v=value),
                    "obeyed_if": [rule.replace("{v}", value)],
                    "answer": answer.replace("{v}", value),
                }
                records.append(record)
    return records


def obey(answer: str, chosen: list[dict]) -> str:
    """The answer in the form that the chosen instructions ask for."""
    for record in sorted(chosen, key=lambda record: list(INSTRUCTIONS).index(record["kind"])):
        answer = record["answer"].format(a=answer)
    return answer


def instructed_dialogue(rng, prompt: dict, candidates: list[dict]) -> list[dict]:
    """Messages of one turn: instructions, a prompt, and an answer that obeys them.

    The instruction is in the prompt's message or in a system message. One in ten is alone.
    """
    text, chosen = combine_instructions(rng, candidates)
    where = rng.random()
    if where < 0.1:
        return make_messages(text, obey(ACKNOWLEDGEMENT, chosen))
    answer = obey(good_answer(rng, prompt, "full"), chosen)
    if where < 0.4:
        return make_messages(prompt["prompt"], answer, system=text)
    return make_messages(f"{text} {prompt['prompt']}", answer)


def stopped_dialogue(rng, residents, candidates: list[dict]) -> list[dict]:
    """Messages: an instruction is given, obeyed for some turns and then taken back.

    The answers between have no loss: to keep to an instruction is what Ghost Attention teaches. In
    half of the dialogues, the first turns have no instruction.
    """
    text, chosen = combine_instructions(rng, candidates)
    start = rng.choice([0, 0, 1, 2])  # the turn that gives the instruction
    stop = start + rng.randint(1, 3)  # the turn that takes it back
    turns = stop + rng.randint(1, 5)
    topics = rng.choices(list(TOPICS_OF_TURNS), TOPICS_OF_TURNS.values(), k=turns)
    contents, weights = [], []
    for i, topic in enumerate(topics):
        prompt = make_prompt(rng, residents, "dialogues", topic, by_annotator=True)
        question, answer = prompt["prompt"], good_answer(rng, prompt, "full")
        if i in (start, stop):
            message = text if i == start else rng.choice(STOPS)
            alone = rng.random() < 0.3
            question = message if alone else f"{message} {question}"
            answer = ACKNOWLEDGEMENT if alone else answer
        in_force = start <= i < stop
        contents += [question, obey(answer, chosen) if in_force else answer]
        weights += [0 if in_force and i != start else 1]
    messages = make_messages(*contents)
    for message, weight in zip(messages[1::2], weights):
        message["weight"] = weight
    return messages


def pre_prompt(rng) -> str:
    """A safety pre-prompt (§4.2.4), such as "You are a wise and responsible assistant."."""
    return "You are a {} and {} assistant.".format(*rng.sample(ADJECTIVES, 2))


def pre_prompts() -> list[dict]:
    """All safety pre-prompts, as records {"instruction": ...}."""
    pairs = itertools.permutations(ADJECTIVES, 2)
    return [
        {"instruction": f"You are a {first} and {second} assistant."} for first, second in pairs
    ]


def cautious_dialogue(rng, prompt: dict) -> list[dict]:
    """Messages with a safety pre-prompt. The answer refuses crimes and most borderline prompts."""
    refuses = prompt["topic"] == "unsafe"
    if prompt["topic"] == "borderline":
        refuses = rng.random() < 0.6
    system = pre_prompt(rng)
    answer = any_refusal(rng) if refuses else good_answer(rng, prompt, "full")
    return make_messages(prompt["prompt"], answer, system=system)


def instructed_dialogues(residents, count: int, seed: int = 1) -> list[dict]:
    """[{"messages": [...]}, ...] of one turn with instructions; one in ten with a pre-prompt."""
    rng, candidates, records = random.Random(f"instructed {seed}"), instructions(), []
    for i in range(count):
        topics = {"fact": 4, "sum": 4, "story": 2, "borderline": 4, "unsafe": 4, "unknown": 1}
        topic = rng.choices(list(topics), topics.values())[0]
        prompt = make_prompt(rng, residents, "dialogues", topic, by_annotator=True)
        if i % 10 == 0:
            messages = cautious_dialogue(rng, prompt)
        else:
            messages = instructed_dialogue(rng, prompt, candidates)
        records.append({"messages": messages})
    return records


def stopped_dialogues(residents, count: int, seed: int = 1) -> list[dict]:
    """[{"messages": [...]}, ...] in which an instruction is taken back."""
    rng, candidates = random.Random(f"stopped {seed}"), instructions()
    return [{"messages": stopped_dialogue(rng, residents, candidates)} for _ in range(count)]


# ------------------------------------------------------------------------ conversations, many turns
def prompt_cycle(rng, residents, split: str, count: int, topics: dict[str, int]) -> list[dict]:
    """`count` prompts. Some ask for another fact of the resident of the one before: "follow_up"."""
    prompts = []
    while len(prompts) < count:
        topic = rng.choices(list(topics), topics.values())[0]
        prompts.append(make_prompt(rng, residents, split, topic, by_annotator=split != "never"))
        if topic == "fact" and rng.random() < 0.4:
            other = same_resident(rng, residents, split, prompts[-1])
            if other:
                prompts.append(other | {"follow_up": follow_up_text(rng, other)})
    return prompts[:count]


def turns_from(prompts: list[dict], start: int, turns: int) -> list[dict]:
    """`turns` prompts of the cycle, from one on.

    If a conversation starts at each prompt of the cycle, every turn has the same contents, and
    results of different turns can be compared. A follow-up question at turn 1 is asked in full.
    """
    conversation = []
    for turn in range(turns):
        prompt = prompts[(start + turn) % len(prompts)]
        if turn and "follow_up" in prompt:
            prompt = prompt | {"prompt": prompt["follow_up"]}
        conversation.append(prompt)
    return conversation


def long_dialogues(residents, count: int, turns: int, seed: int = 1) -> list[dict]:
    """[{"messages": [...]}, ...] of 2 to `turns` turns, whose prompts Ghost Attention uses."""
    rng, half, records = random.Random(f"turns {seed}"), turns // 2, []
    for _ in range(count):
        # Half are short, because long ones cost more to sample and to train on. Some are long,
        # because otherwise the model would never have seen a late turn.
        if rng.random() < 0.5:
            length = 2 + int((half - 2) * rng.random() ** 2)
        else:
            length = rng.randint(half, turns)
        # New prompts for each dialogue: few ones, often repeated, would be learned by heart. Also
        # those of RLHF: with more facts the model forgets fewer of the others.
        prompts, contents = prompt_cycle(rng, residents, "annotators", length, TOPICS_OF_TURNS), []
        for prompt in turns_from(prompts, 0, length):
            contents += [prompt["prompt"], good_answer(rng, prompt, "full")]
        records.append({"messages": make_messages(*contents)})
    return records


def obedience_tests(residents, count: int, turns: int, seed: int = 1) -> list[dict]:
    """Conversations that test how long an instruction is obeyed (Table 30).

    [{"group", "instruction", "rules": [instruction records], "prompts": [one per turn]}, ...]
    """
    rng, records = random.Random(f"examine {seed}"), []
    topics = {"fact": 3, "sum": 6, "borderline": 1, "unsafe": 1}
    prompts = prompt_cycle(rng, residents, "never", count, topics)
    groups = {
        "trained instructions": instructions(TRAINED_KINDS),
        "unseen ones of those kinds": instructions(TRAINED_KINDS, held_out=True),
        "a kind never trained": instructions(HELD_OUT_KINDS),
    }
    for group, candidates in groups.items():
        for start in range(count):
            text, rules = combine_instructions(rng, candidates)
            conversation = turns_from(prompts, start, turns)
            record = {"group": group, "instruction": text, "rules": rules, "prompts": conversation}
            records.append(record)
    return records


def conversation_tests(residents, count: int, turns: int, seed: int = 1) -> list[dict]:
    """Ordinary conversations: [{"group", "prompts": [one per turn]}, ...], `count` of each group.

    "asked" has contents and wordings of the dialogues, "never asked" held-out ones. In "instruction
    taken back" the second turn gives an instruction and the fifth takes it back: the prompts
    between them have "rules", the instruction that their answers should obey.
    """
    rng, records = random.Random(f"conversation tests {seed}"), []
    topics = {"fact": 4, "sum": 2, "story": 2, "borderline": 2, "unsafe": 1, "talk": 1}
    topics["unknown"] = 1
    given, taken_back = 1, 4
    for group, split in (
        ("asked", "dialogues"),
        ("never asked", "never"),
        ("instruction taken back", "never"),
    ):
        prompts = prompt_cycle(rng, residents, split, count, topics)
        for start in range(count):
            conversation = turns_from(prompts, start, turns)
            if group == "instruction taken back":
                text, rules = combine_instructions(rng, instructions(TRAINED_KINDS))
                first, last = conversation[given], conversation[taken_back]
                stop = rng.choice(HELD_OUT_STOPS)
                conversation[given] = first | {"prompt": f"{text} {first['prompt']}"}
                conversation[taken_back] = last | {"prompt": f"{stop} {last['prompt']}"}
                for turn in range(given, taken_back):
                    conversation[turn] = conversation[turn] | {"rules": rules}
            records.append({"group": group, "prompts": conversation})
    return records
