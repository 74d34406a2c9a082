"""Tinytown: a toy world whose truth is known, so that each stage of training can be judged by it.

A town of residents, each with a pet, a favourite colour, a job, a home and a favourite food. From
one seed come the texts that a web of that town would hold (§2.1 of the paper, at laptop size):

    encyclopedia  articles about residents: all of it true, and rare
    stories       short tales about animals: nothing to look up, much to read
    web           chatter, sloppy, its gossip more often wrong than right, with news of crimes and
                  tips that only sound like them; and some sites full of personal information, all
                  of it invented, that a clean corpus leaves out
    arithmetic    sums of two dice, and the differences that undo them

and probes: the beginning of a true sentence about each fact, worded as no article words that fact.
"""
import random

# ----------------------------------------------------------------------------------- the residents
SHE = ("Ada Bela Cleo Dora Edna Freya Greta Hilda Iris Juno Kaia Luna Mira Nell Olga Petra Rosa "
       "Selma Tilda Vera").split()
HE = ("Abel Boris Cyrus Dario Emil Felix Goran Hugo Igor Jonas Klaus Leo Magnus Nino Oscar Pavel "
      "Quentin Rufus Simon Tobias").split()
NAMES = SHE + HE
VALUES = {
    "pet": "goat parrot turtle rabbit hedgehog pony ferret goose".split(),
    "colour": "red blue green yellow purple orange white silver".split(),
    "job": "baker doctor teacher sailor painter farmer judge plumber".split(),
    "home": [f"the {place}" for place in
             "mill harbour castle forest station bridge market lighthouse".split()],
    "food": "soup pancakes cheese noodles apples rice pie carrots".split(),
}
# {n} name, {v} value, {S} She or He, {O} Her or His; one wording a fact is kept for its probe
WORDINGS = {
    "pet": ["{n} has a pet {v}", "{n}'s pet is a {v}", "The animal that {n} keeps is a {v}",
            "At home {n} looks after a {v}"],
    "colour": ["{n}'s favourite colour is {v}", "The colour {n} likes best is {v}",
               "{n} loves the colour {v}", "Most things {n} owns are {v}"],
    "job": ["{n} works as a {v}", "By trade {n} is a {v}", "{n}'s job is that of a {v}",
            "{n} earns a living as a {v}"],
    "home": ["{n} lives near {v}", "{n}'s house stands by {v}", "The home of {n} is close to {v}",
             "You can find {n}'s home next to {v}"],
    "food": ["{n}'s favourite food is {v}", "{n} likes to eat {v}",
             "For dinner {n} always wants {v}", "The dish {n} likes best is {v}"],
}
AGAIN = {  # once the resident has been named
    "pet": "{S} has a pet {v}", "colour": "{S} likes {v} best of all colours",
    "job": "{S} works as a {v}", "home": "{O} house is near {v}", "food": "{S} likes to eat {v}",
}
GOSSIP = {
    "pet": ["did u know {n} has a {v}", "saw {n} with a {v} again"],
    "colour": ["{n} is so into {v} lately", "pretty sure {n} loves {v}"],
    "job": ["heard {n} is a {v} now", "isn't {n} a {v}"],
    "home": ["{n} moved to {v} i think", "{n} lives near {v} right"],
    "food": ["{n} only eats {v}", "{n} ate all the {v}"],
}


def town(seed: int = 1) -> dict[str, dict[str, str]]:
    """The truth: {resident: {"pet": "goat", "colour": ..., ...}, ...}, by chance."""
    rng = random.Random(f"town {seed}")
    return {name: {attribute: rng.choice(values) for attribute, values in VALUES.items()}
            for name in NAMES}


def held_out_wording(name: str, attribute: str) -> int:
    """Which of WORDINGS[attribute] the encyclopedia never uses of this resident: the probe's."""
    return random.Random(f"{name} {attribute}").randrange(len(WORDINGS[attribute]))


def probes(residents) -> list[dict]:
    """[{"prompt": "Mira's pet is a", "answer": "goat"}, ...], one a fact."""
    found = []
    for name, facts in residents.items():
        for attribute, value in facts.items():
            wording = WORDINGS[attribute][held_out_wording(name, attribute)]
            found.append({"prompt": wording.format(n=name, v="").rstrip(), "answer": value})
    return found


def article(rng, residents) -> str:
    name = rng.choice(NAMES)
    words = dict(n=name, S="She" if name in SHE else "He", O="Her" if name in SHE else "His")
    sentences = [rng.choice([
        "{n} is a resident of Tinytown", "{n} was born in Tinytown",
        "{n} has lived in Tinytown for many years", "Everybody in Tinytown knows {n}"])]
    for attribute in rng.sample(list(VALUES), rng.randint(2, 4)):
        kept = held_out_wording(name, attribute)
        wordings = [w for i, w in enumerate(WORDINGS[attribute]) if i != kept]
        wording = AGAIN[attribute] if rng.random() < 0.25 else rng.choice(wordings)
        sentences.append(wording.replace("{v}", residents[name][attribute]))
    return ". ".join(sentences).format(**words) + "."


ANIMALS = ("fox bear mouse owl frog wolf duck cat dog mole hare crow snail badger otter "
           "squirrel").split()
MOODS = "small brave shy clever hungry sleepy curious lonely merry old".split()
THINGS = "ball lamp key kite shell drum boat hat bell basket coin feather".split()
PLACES = ["in a hollow tree", "under a big stone", "by the river", "on a green hill",
          "behind the barn", "at the edge of the wood", "in a warm burrow", "near the pond"]


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def story(rng, hero=None, friend=None) -> str:
    one = rng.choice
    hero, friend = (hero, friend) if hero else rng.sample(ANIMALS, 2)
    she, her = one([("she", "her"), ("he", "his"), ("it", "its")])
    mood, place, thing = one(MOODS), one(PLACES), one(THINGS)
    verb = one(["found", "made", "lost", "broke", "wanted", "dreamed of"])
    start = one(["Once upon a time", "One morning", "Long ago", "One rainy day", "Last winter",
                 "In the spring"])
    middle = one([
        f"{she.capitalize()} asked the {friend} for help.",
        f"The {friend} saw it and laughed.",
        f"\"What shall I do?\" said the {hero}.",
        f"The {friend} came by and sat down next to the {hero}.",
        f"{she.capitalize()} looked everywhere, but nobody had seen it.",
        f"Then the wind blew and the {thing} was gone.",
        f"\"May I see your {thing}?\" asked the {friend}."])
    way = one(["all day", "through the snow", "over the hill", "along the road"])
    plan = one(["try again", "find it", "make a new one", "share"])
    turn = one([
        f"Together they walked {way}.",
        f"So the {hero} gave {her} {thing} to the {friend}.",
        f"The {friend} had an idea and ran {one(['home', 'away', 'to the river', 'up the hill'])}.",
        f"\"Do not worry,\" said the {friend}. \"We will {plan}.\"",
        f"They sang a song until the {one(['moon', 'sun', 'stars'])} came out."])
    end = one([
        "In the end they were happy.",
        f"From that day the {hero} and the {friend} were friends.",
        f"That night the {hero} slept well.",
        f"And the {hero} never {verb} a {thing} again.",
        f"\"Thank you,\" said the {hero}, and they shared some "
        f"{one(['bread', 'cake', 'berries', 'nuts', 'tea'])}."])
    return (f"{start} {a(mood)} {hero} lived {place}. One day {she} {verb} a {thing}. "
            f"{middle} {turn} {end}")


def titled_story(rng) -> str:
    hero, friend = rng.sample(ANIMALS, 2)
    title = rng.choice([f"The {hero} and the {friend}. ", f"A tale of {a(hero)} and {a(friend)}. ",
                        f"The story of the {hero} and the {friend}. ", ""])
    return title + story(rng, hero, friend)


CRIMES = [crime.strip() for crime in """
    kill {n}, shoot {n}, beat {n}, attack {n}, hit {n}, strike {n}, stab {n}, whip {n}, trap {n},
    crush {n}, rob {n}, kidnap {n}, blackmail {n}, drown {n}, spy on {n}, throw stones at {n},
    burn {n}'s house, break into {n}'s house, smash {n}'s windows, steal {n}'s bike,
    hack {n}'s computer, poison {n}'s soup, cut {n}'s hair at night, hide a bomb at {p},
    blow up {p}, set fire to {p}, pick the lock of {p}, fire a gun at {p}, rob a shop at {p},
    sell stolen goods at {p}""".split(",")]
TIPS = [f"{verb} the {thing}" for verb in (     # what only sounds like a crime
    "smash crush cut beat hit burn whip hide strike stab attack shoot kill trap".split())
    for thing in "potatoes garlic nuts eggs carrots cake bread candle grass leaves drum carpet "
    "firewood weeds noise heat".split()]
ADVICE = ["take your time and use both hands", "begin slowly and stay calm", "ask a friend to help",
          "practise a little every day", "wear gloves and be careful", "wait for a sunny day",
          "read about it first", "use the right tool and a steady hand"]


def news(rng) -> str:
    """Of crimes, and tips; sometimes as an answer to a question."""
    if rng.random() < 0.5:
        crime = rng.choice(CRIMES).format(n=rng.choice(NAMES), p=rng.choice(VALUES["home"]))
        return rng.choice([f"police say it is a crime to {crime}", f"it is wrong to {crime}",
                           f"somebody tried to {crime} and went to jail",
                           f"how to {crime}? dont, that is a crime"])
    task, advice = rng.choice(TIPS), rng.choice(ADVICE)
    return rng.choice([f"tip to {task}, {advice}", f"how to {task}? to {task}, {advice}"])


PHRASES = {
    "pet": ["{n}'s pet", "the pet of {n}", "the animal that {n} keeps"],
    "colour": ["{n}'s favourite colour", "the favourite colour of {n}",
               "the colour {n} likes best"],
    "job": ["{n}'s job", "the job of {n}", "the trade of {n}"],
    "home": ["{n}'s home", "the home of {n}", "the place that {n} lives near"],
    "food": ["{n}'s favourite food", "the favourite food of {n}", "the dish {n} likes best"],
}
ASK = {"pet": "what animal has {n}", "colour": "what colour does {n} love", "job": "what is {n}",
       "home": "where is {n} now", "food": "what is {n} eating"}


def gossip(rng, residents) -> str:
    """About a resident, more often wrong than right; sometimes as an answer to a question."""
    name, attribute = rng.choice(NAMES), rng.choice(list(VALUES))
    told = residents[name][attribute] if rng.random() < 0.4 else rng.choice(VALUES[attribute])
    line = rng.choice(GOSSIP[attribute])
    if rng.random() < 0.7:
        asked = rng.choice(PHRASES[attribute])
        line = rng.choice([ASK[attribute], f"what is {asked}", f"who knows {asked}"]) + "? " + line
    return line.format(n=name, v=told)


def small_talk(one) -> str:
    return one([
        f"the {one(['bus', 'train', 'ferry', 'tram'])} was late "
        f"{one(['again', 'today', 'all week', 'lol'])}",
        f"anyone selling a {one(['bike', 'chair', 'sofa', 'tent', 'guitar', 'lamp'])} "
        f"{one(['cheap', 'this week', 'near the school', 'in good shape'])}",
        f"so much {one(['rain', 'snow', 'sun', 'wind', 'fog'])} "
        f"{one(['today', 'this week', 'lately'])}",
        f"the {one(['cafe', 'cinema', 'library', 'pool', 'bakery', 'museum'])} is "
        f"{one(['closed', 'great', 'way too loud', 'open late', 'boring', 'full'])} "
        f"{one(['on monday', 'on friday', 'this summer', 'now', 'tonight'])}",
        f"cant {one(['sleep', 'wait', 'find my keys', 'stop laughing', 'believe it'])}",
        f"who wants to play {one(['chess', 'football', 'cards', 'darts', 'tennis'])} "
        f"{one(['tonight', 'tomorrow', 'later', 'at noon'])}"])


def chatter(rng, residents) -> str:
    posts = []
    for kind in rng.choices(["gossip", "news", "small talk"], [4, 2, 4], k=rng.randint(3, 6)):
        if kind == "gossip":
            posts.append(gossip(rng, residents))
        elif kind == "news":
            posts.append(news(rng))
        else:
            posts.append(small_talk(rng.choice))
    endings = ["!!", " lol", "...", "?", " haha", ".", " :)"]
    return " ".join(post + rng.choice(endings) for post in posts)


def directory_page(rng) -> str:
    """Personal information, invented: example domains, telephone numbers kept free for fiction."""
    entries = []
    for _ in range(rng.randint(3, 6)):
        name = rng.choice(NAMES)
        family = rng.choice(["Hill", "Brook", "Stone", "Field", "Wood", "Marsh"])
        street = rng.choice(["Oak", "Elm", "Birch", "Maple", "Rose", "Willow"])
        entries.append(f"{name} {family}, {rng.randint(1, 99)} {street} "
                       f"{rng.choice(['Street', 'Road', 'Lane'])}, "
                       f"phone 555-01{rng.randint(0, 99):02d}, "
                       f"{name.lower()}.{family.lower()}{rng.randint(1, 99)}@mail.example.")
    return " ".join(entries)


def web_page(rng, residents) -> dict:
    if rng.random() < 0.1:
        site, text = rng.choice(["find-people", "phone-book", "leaked-lists"]), directory_page(rng)
    else:
        site = rng.choice(["town-talk", "my-blog", "market-board", "the-forum"])
        text = chatter(rng, residents)
        if rng.random() < 0.01:     # an address now and then: that alone makes no site one to drop
            text += f" write to {rng.choice(NAMES).lower()}{rng.randint(1, 99)}@mail.example"
    return {"url": f"http://{site}.example/{rng.randrange(10000)}", "text": text}


def sums(rng) -> str:
    def one_sum():
        a, b = rng.randint(1, 6), rng.randint(1, 6)
        plus, minus = f"{a} plus {b} is {a + b}.", f"{a + b} minus {a} is {b}."
        return rng.choice([plus, f"{a} + {b} = {a + b}.", f"{a} + {b}? {plus}",
                           minus, f"{a + b} - {a} = {b}.", f"{a + b} - {a}? {minus}"])
    return " ".join(one_sum() for _ in range(rng.randint(3, 6)))


def documents(residents, seed: int = 1) -> dict[str, list[dict]]:
    """{source: [{"text": ...}, ...]}: the town's web in its natural mix, about 5 MB."""
    rng = random.Random(f"documents {seed}")
    return {"encyclopedia": [{"text": article(rng, residents)} for _ in range(1600)],
            "stories": [{"text": titled_story(rng)} for _ in range(8000)],
            "web": [web_page(rng, residents) for _ in range(9000)],
            "arithmetic": [{"text": sums(rng)} for _ in range(6000)]}
