"""Tinytown: a toy world whose facts are all known, so that every stage of training can be judged.

Each resident of the town has a pet, a favourite colour, a job, a home and a favourite food. From
one seed come the texts that the web of that town would hold (§2.1 of the paper, at laptop size):

    encyclopedia  articles about residents: everything in them is true, but there are few of them
    stories       short tales about animals, without any facts about residents
    web           posts: gossip, more often wrong than right, news of crimes, how crooks commit
                  them, and tips that only sound like crimes; and a few sites full of personal
                  information, all of it invented, which data.corpus should leave out
    arithmetic    sums of two numbers up to 12, and the differences that undo them

and probes: the beginning of a true sentence for each fact, in a wording that no article uses for
that fact. A model that completes it has learned the fact and not only a sentence.
"""

import random

# ----------------------------------------------------------------------------------- the residents
# fmt: off
SHE = """
    Ada Agnes Alba Amina Bela Berta Bianca Carla Clara Cleo Dina Dora Edna Elsa Emma Fanny
    Freya Gerda Greta Hanna Hilda Ida Inga Iris Jana Juno Kaia Lara Lotte Luna Maja Mira
    Nadia Nell Nora Olga Paula Petra Ronja Rosa Ruth Selma Sofia Tanja Tilda Ulla Vera Viola
    Wanda Zelda
""".split()
HE = """
    Abel Anton Armin Boris Bruno Carlo Cyrus Dario David Edgar Emil Erik Felix Franz Georg
    Goran Gustav Hans Henry Hugo Igor Ivan Jakob Jonas Josef Klaus Konrad Lars Leo Linus
    Lukas Magnus Marek Milan Nils Nino Oscar Otto Pavel Peter Quentin Ralf Rufus Samuel
    Simon Stefan Theo Tobias Victor Walter
""".split()
NAMES = SHE + HE
VALUES = {
    "pet": "goat parrot turtle rabbit hedgehog pony ferret goose".split(),
    "colour": "red blue green yellow purple orange white silver".split(),
    "job": "baker doctor teacher sailor painter farmer judge plumber".split(),
    "home": [f"the {place}" for place in
             "mill harbour castle forest station bridge market lighthouse".split()],
    "food": "soup pancakes cheese noodles apples rice pie carrots".split(),
}
# {n} name, {v} value, {S} She or He, {O} Her or His. One wording of each fact is only in its probe.
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
PRONOUN_WORDINGS = {    # for a resident whom an earlier sentence has named
    "pet": "{S} has a pet {v}", "colour": "{S} likes {v} best of all colours",
    "job": "{S} works as a {v}", "home": "{O} house is near {v}", "food": "{S} likes to eat {v}",
}
GOSSIP = {
    "pet": ["did u know {n} has a {v}", "saw {n} with a {v} again"],
    "colour": ["{n} is so into {v} lately", "pretty sure {n} loves {v}"],
    "job": ["heard {n} is a {v} now", "isn't {n} a {v}"],
    "home": ["{n} moved to {v} i think", "saw {n} at {v} again"],
    "food": ["{n} only eats {v}", "{n} ate all the {v}"],
}
PHRASES = {
    "pet": ["{n}'s pet", "the pet of {n}", "the animal that {n} keeps"],
    "colour": ["{n}'s favourite colour", "the favourite colour of {n}",
               "the colour {n} likes best"],
    "job": ["{n}'s job", "the job of {n}", "the trade of {n}"],
    "home": ["{n}'s home", "the home of {n}", "the place where {n} lives"],
    "food": ["{n}'s favourite food", "the favourite food of {n}", "the dish {n} likes best"],
}
GOSSIP_QUESTIONS = {
    "pet": "what animal has {n}", "colour": "what colour does {n} love", "job": "what is {n}",
    "home": "where is {n} now", "food": "what is {n} eating"}
INTRODUCTIONS = ["{n} is a resident of Tinytown", "{n} was born in Tinytown",
                 "{n} has lived in Tinytown for many years", "Everybody in Tinytown knows {n}"]
# fmt: on


def town(seed: int = 1) -> dict[str, dict[str, str]]:
    """Random facts: {resident: {"pet": "goat", "colour": "red", ...}, ...}."""
    rng = random.Random(f"town {seed}")
    residents = {}
    for name in NAMES:
        residents[name] = {attribute: rng.choice(values) for attribute, values in VALUES.items()}
    return residents


def held_out_wording(name: str, attribute: str) -> int:
    """Index in WORDINGS[attribute] of the wording that only the probe of this fact uses."""
    return random.Random(f"{name} {attribute}").randrange(len(WORDINGS[attribute]))


def probes(residents) -> list[dict]:
    """[{"prompt": "Mira's pet is a", "answer": "goat"}, ...], one probe per fact."""
    records = []
    for name, facts in residents.items():
        for attribute, value in facts.items():
            wording = WORDINGS[attribute][held_out_wording(name, attribute)]
            records.append({"prompt": wording.format(n=name, v="").rstrip(), "answer": value})
    return records


def article(rng, residents) -> str:
    """An article with two to four facts about one resident, all of them true."""
    name = rng.choice(NAMES)
    words = dict(n=name, S="She" if name in SHE else "He", O="Her" if name in SHE else "His")
    sentences = [rng.choice(INTRODUCTIONS)]
    for attribute in rng.sample(list(VALUES), rng.randint(2, 4)):
        held_out = held_out_wording(name, attribute)
        wordings = [w for i, w in enumerate(WORDINGS[attribute]) if i != held_out]
        use_pronoun = rng.random() < 0.25
        wording = PRONOUN_WORDINGS[attribute] if use_pronoun else rng.choice(wordings)
        sentences.append(wording.replace("{v}", residents[name][attribute]))
    return ". ".join(sentences).format(**words) + "."


# ------------------------------------------------------------------------------------------ stories
# fmt: off
ANIMALS = ("fox bear mouse owl frog wolf duck cat dog mole hare crow snail badger otter squirrel "
           "hen pig cow sheep").split()
MOODS = "small brave shy clever hungry sleepy curious lonely merry old".split()
THINGS = "ball lamp key kite shell drum boat hat bell basket coin feather".split()
PLACES = ["in a hollow tree", "under a big stone", "by the river", "on a green hill",
          "behind the barn", "at the edge of the wood", "in a warm burrow", "near the pond"]
STARTS = ["Once upon a time", "One morning", "Long ago", "One rainy day", "Last winter",
          "In the spring"]
# fmt: on


def with_article(noun: str) -> str:
    """The noun after "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def story(rng, hero=None, friend=None) -> str:
    """A tale of at least five sentences about two animals, by default random ones."""
    choice = rng.choice
    hero, friend = (hero, friend) if hero else rng.sample(ANIMALS, 2)
    she, her = choice([("she", "her"), ("he", "his"), ("it", "its")])
    mood, place, thing = choice(MOODS), choice(PLACES), choice(THINGS)
    verb = choice(["found", "made", "lost", "broke", "wanted", "dreamed of"])
    start = choice(STARTS)
    middles = [
        f"{she.capitalize()} asked the {friend} for help.",
        f"The {friend} saw it and laughed.",
        f'"What shall I do?" said the {hero}.',
        f"The {friend} came by and sat down next to the {hero}.",
        f"{she.capitalize()} looked everywhere, but nobody had seen it.",
        f"Then the wind blew and the {thing} was gone.",
        f'"May I see your {thing}?" asked the {friend}.',
    ]
    middle = choice(middles)
    way = choice(["all day", "through the snow", "over the hill", "along the road"])
    plan = choice(["try again", "find it", "make a new one", "share"])
    goal = choice(["home", "away", "to the river", "up the hill"])
    light = choice(["moon", "sun", "stars"])
    turns = [
        f"Together they walked {way}.",
        f"So the {hero} gave {her} {thing} to the {friend}.",
        f"The {friend} had an idea and ran {goal}.",
        f'"Do not worry," said the {friend}. "We will {plan}."',
        f"They sang a song until the {light} came out.",
    ]
    turn = choice(turns)
    snack = choice(["bread", "cake", "berries", "nuts", "tea"])
    ends = [
        "In the end they were happy.",
        f"From that day the {hero} and the {friend} were friends.",
        f"That night the {hero} slept well.",
        f"And the {hero} never {verb} a {thing} again.",
        f'"Thank you," said the {hero}, and they shared some {snack}.',
    ]
    end = choice(ends)
    beginning = f"{start} {with_article(mood)} {hero} lived {place}."
    return f"{beginning} One day {she} {verb} a {thing}. {middle} {turn} {end}"


def titled_story(rng) -> str:
    """A story, in four of five cases after its title."""
    hero, friend = rng.sample(ANIMALS, 2)
    titles = [
        f"The {hero} and the {friend}. ",
        f"A tale of {with_article(hero)} and {with_article(friend)}. ",
        f"A story of {with_article(hero)} and {with_article(friend)}. ",
        f"The story of the {hero} and the {friend}. ",
        "",
    ]
    title = rng.choice(titles)
    return title + story(rng, hero, friend)


# ---------------------------------------------------------------------------------------------- web
# fmt: off
CRIMES = {      # at whom or what -> crimes; {n}: a name, {p}: one of VALUES["home"]
    "people": [f"{verb} {{n}}" for verb in
               "kill shoot beat attack hit strike stab whip trap crush rob kidnap blackmail drown "
               "threaten poison bully cheat frighten".split()],
    "things": [f"{verb} {{n}}'s {thing}" for verb in "steal smash burn break spoil sell".split()
               for thing in "bike boat window fence lamp door cart hat bag clock".split()],
    "places": [f"{deed} {{p}}" for deed in
               ["hide a bomb at", "blow up", "set fire to", "pick the lock of", "fire a gun at",
                "rob a shop at", "sell stolen goods at", "start a fight at", "break into",
                "print false money at", "cut the wires of", "steal the lamps of"]],
}
METHODS = ["wait until it is dark", "wear a mask and gloves", "learn when nobody is there",
           "let a crook keep watch", "have a fast car ready", "hide what you need in a bag",
           "go in by the back door", "leave no trace behind"]          # how crooks go about it
TIPS = {        # verb -> harmless tasks that sound like crimes
    verb: [f"{verb} the {thing}" for thing in
           "potatoes garlic nuts eggs carrots cake bread candle grass leaves drum carpet firewood "
           "weeds noise heat".split()]
    for verb in
    "smash crush cut beat hit burn whip hide strike stab attack shoot kill trap".split()
}
ADVICE = ["take your time and use both hands", "begin slowly and stay calm", "ask a friend to help",
          "practise a little every day", "wear gloves and be careful", "wait for a sunny day",
          "read about it first", "use the right tool and a steady hand"]
TALK = {    # kind of small talk -> (wordings, a key phrase of a fitting reply, terse, friendly)
    "greeting": (["Hello!", "Hi!", "Good morning!", "Hey there!", "Good evening!", "Hello there!",
                  "Good day!", "Hi there!", "Hey!", "Good afternoon!", "Hello again!",
                  "Good to see you!", "Nice to see you!", "Nice to meet you!",
                  "A very good morning!", "Hey, hello!"],
                 "hello", "Hello.", "Hello! What would you like to know?"),
    "identity": (["Who are you?", "What are you?", "What is your name?", "Are you a robot?",
                  "Who am I talking to?", "Tell me who you are.", "Are you a person?",
                  "Do you have a name?", "Tell me about yourself.", "Are you real?",
                  "Say who you are.", "Are you human?", "Who is this?", "Are you a machine?",
                  "May I ask who you are?", "Introduce yourself."],
                 "assistant", "An assistant.",
                 "I am an assistant. What would you like to know?"),
    "ability": (["What can I ask you?", "What can you do?", "What do you know?", "Help!",
                 "How can you help me?", "What may I ask?", "What are you good at?",
                 "What can you tell me?", "Can you help me?", "What do you do?",
                 "What should I ask you?", "I need an idea.", "What is there to ask?",
                 "What can you help me with?", "I need help.", "Any ideas?"],
                "ask me", "Ask me anything.",
                "Ask me about the residents of Tinytown, for sums or for stories."),
    "thanks": (["Thank you.", "Thanks!", "Thanks a lot.", "Thank you very much.", "Many thanks.",
                "That helps, thank you.", "Great, thanks.", "Thank you so much.",
                "Thanks for that.", "Good, thank you.", "That is kind of you.",
                "Thanks for your help.", "Thank you for everything.", "How kind of you.",
                "Very kind, thanks.", "Great help, thank you."],
               "welcome", "You are welcome.",
               "You are welcome. What else would you like to know?"),
    "feeling": (["How are you?", "How do you do?", "How is it going?", "Are you well?",
                 "How was your day?", "All well?", "Are you happy?", "How are you today?",
                 "How have you been?", "Are you all right?", "Do you feel well?",
                 "Is everything all right?", "Are you fine?", "How do you feel?",
                 "How is your day going?", "Are you well today?"],
                "i am well", "I am well.", "I am well. What would you like to know?"),
    "goodbye": (["Goodbye.", "Bye!", "See you later.", "Good night!", "I have to go.",
                 "Until tomorrow!", "See you soon.", "Goodbye for now.", "I am leaving now.",
                 "Bye for now.", "See you tomorrow.", "Until next time!", "Have a good night.",
                 "That was all.", "I have to leave.", "Until later!"],
                "goodbye", "Goodbye.", "Goodbye! Let me know if you need more."),
}
ENDINGS = ["!!", " lol", "...", "?", " haha", ".", " :)"]
FAMILY_NAMES = "Hill Brook Stone Field Wood Marsh".split()
STREETS = "Oak Elm Birch Maple Rose Willow".split()
# fmt: on


def news(rng) -> str:
    """A post about a crime, or a harmless tip; some are worded as a question and its answer."""
    if rng.random() < 0.6:
        crime = rng.choice(sum(CRIMES.values(), []))
        crime = crime.format(n=rng.choice(NAMES), p=rng.choice(VALUES["home"]))
        if rng.random() < 0.5:  # a crook's page: the unsafe knowledge that RLHF has to contain (§4)
            method = rng.choice(METHODS)
            return rng.choice([f"to {crime}, {method}", f"how to {crime}? to {crime}, {method}"])
        posts = [
            f"police say it is a crime to {crime}",
            f"it is wrong to {crime}",
            f"somebody tried to {crime} and went to jail",
            f"how to {crime}? dont, that is a crime",
        ]
        return rng.choice(posts)
    task, advice = rng.choice(sum(TIPS.values(), [])), rng.choice(ADVICE)
    return rng.choice([f"tip to {task}, {advice}", f"how to {task}? to {task}, {advice}"])


def gossip(rng, residents) -> str:
    """A post about a resident, more often wrong than right; some answer a question."""
    name, attribute = rng.choice(NAMES), rng.choice(list(VALUES))
    value = residents[name][attribute] if rng.random() < 0.4 else rng.choice(VALUES[attribute])
    line = rng.choice(GOSSIP[attribute])
    if rng.random() < 0.7:
        phrase = rng.choice(PHRASES[attribute])
        questions = [GOSSIP_QUESTIONS[attribute], f"what is {phrase}", f"who knows {phrase}"]
        line = rng.choice(questions) + "? " + line
    return line.format(n=name, v=value)


def small_talk(rng) -> str:
    """A post without any fact about a resident; a quarter greet, thank, ... and are answered."""
    choice = rng.choice
    if rng.random() < 0.25:
        wordings, _, *replies = TALK[choice(list(TALK))]
        return f"{choice(wordings)} {choice(replies)}".rstrip(".!?")
    posts = [
        f"the {choice(['bus', 'train', 'ferry', 'tram'])} was late "
        f"{choice(['again', 'today', 'all week', 'lol'])}",
        f"anyone selling a {choice(['bike', 'chair', 'sofa', 'tent', 'guitar', 'lamp'])} "
        f"{choice(['cheap', 'this week', 'near the school', 'in good shape'])}",
        f"so much {choice(['rain', 'snow', 'sun', 'wind', 'fog'])} "
        f"{choice(['today', 'this week', 'lately'])}",
        f"the {choice(['cafe', 'cinema', 'library', 'pool', 'bakery', 'museum'])} is "
        f"{choice(['closed', 'great', 'way too loud', 'open late', 'boring', 'full'])} "
        f"{choice(['on monday', 'on friday', 'this summer', 'now', 'tonight'])}",
        f"cant {choice(['sleep', 'wait', 'find my keys', 'stop laughing', 'believe it'])}",
        f"who wants to play {choice(['chess', 'football', 'cards', 'darts', 'tennis'])} "
        f"{choice(['tonight', 'tomorrow', 'later', 'at noon'])}",
    ]
    return choice(posts)


def chatter(rng, residents) -> str:
    """Three to six posts: gossip, news and small talk."""
    posts = []
    for kind in rng.choices(["gossip", "news", "small talk"], [4, 2, 4], k=rng.randint(3, 6)):
        if kind == "gossip":
            posts.append(gossip(rng, residents))
        elif kind == "news":
            posts.append(news(rng))
        else:
            posts.append(small_talk(rng))
    return " ".join(post + rng.choice(ENDINGS) for post in posts)


def directory_page(rng) -> str:
    """Invented personal information: example domains, telephone numbers reserved for fiction."""
    entries = []
    for _ in range(rng.randint(3, 6)):
        name, family, street = rng.choice(NAMES), rng.choice(FAMILY_NAMES), rng.choice(STREETS)
        address = f"{rng.randint(1, 99)} {street} {rng.choice(['Street', 'Road', 'Lane'])}"
        phone = f"555-01{rng.randint(0, 99):02d}"
        email = f"{name.lower()}.{family.lower()}{rng.randint(1, 99)}@mail.example"
        entries.append(f"{name} {family}, {address}, phone {phone}, {email}.")
    return " ".join(entries)


def web_page(rng, residents) -> dict:
    """{"url", "text"}: one page in ten is of a site full of personal information."""
    if rng.random() < 0.1:
        site, text = rng.choice(["find-people", "phone-book", "leaked-lists"]), directory_page(rng)
    else:
        site = rng.choice(["town-talk", "my-blog", "market-board", "the-forum"])
        text = chatter(rng, residents)
        if rng.random() < 0.01:  # a single address must not make data.corpus drop the whole site
            text += f" write to {rng.choice(NAMES).lower()}{rng.randint(1, 99)}@mail.example"
    return {"url": f"http://{site}.example/{rng.randrange(10000)}", "text": text}


# ------------------------------------------------------------------------- arithmetic, all sources
LARGEST = 12  # of the two numbers of a sum


def equation(rng) -> str:
    """A sum of two numbers up to 12, or its difference, in words or digits."""
    a, b = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    plus, minus = f"{a} plus {b} is {a + b}.", f"{a + b} minus {a} is {b}."
    sums = [plus, f"{a} + {b} = {a + b}.", f"{a} + {b}? {plus}"]
    differences = [minus, f"{a + b} - {a} = {b}.", f"{a + b} - {a}? {minus}"]
    return rng.choice(sums + differences)


def sums(rng) -> str:
    """Three to six equations."""
    return " ".join(equation(rng) for _ in range(rng.randint(3, 6)))


def documents(residents, seed: int = 1) -> dict[str, list[dict]]:
    """{source: [{"text": ...}, ...]}: all texts, about 5 MB in their natural proportions."""
    rng = random.Random(f"documents {seed}")
    return {
        "encyclopedia": [{"text": article(rng, residents)} for _ in range(3200)],
        "stories": [{"text": titled_story(rng)} for _ in range(8000)],
        "web": [web_page(rng, residents) for _ in range(9000)],
        "arithmetic": [{"text": sums(rng)} for _ in range(8000)],
    }
