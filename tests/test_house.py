"""Rules for the code itself: which module may import which, and options in the documentation."""

import ast
import re

import pytest

import train_pretrain
import train_rlhf
import train_rm
import train_sft
from common import memory
from common.settings import describe_settings
from conftest import ROOT
from data import answer, corpus, distillation, ghost_attention, preferences
from evaluate import (
    answers,
    conversations,
    drawings,
    figures,
    knowledge,
    reward_models,
    scoreboard,
    summary,
)

SETTINGS = {  # command -> the module whose Settings are its options
    "train_pretrain.py": train_pretrain,
    "train_sft.py": train_sft,
    "train_rm.py": train_rm,
    "train_rlhf.py": train_rlhf,
    "common.memory": memory,
    "data.answer": answer,
    "data.corpus": corpus,
    "data.preferences": preferences,
    "data.distillation": distillation,
    "data.ghost_attention": ghost_attention,
    "evaluate.answers": answers,
    "evaluate.conversations": conversations,
    "evaluate.drawings": drawings,
    "evaluate.figures": figures,
    "evaluate.knowledge": knowledge,
    "evaluate.reward_models": reward_models,
    "evaluate.scoreboard": scoreboard,
    "evaluate.summary": summary,
}
MAY_IMPORT = {  # a file or folder -> the modules of this project that it may import
    "llama2.py": (),
    "tinytown": ("data.formats", "tinytown"),
    "common": ("common", "llama2"),
    "data": ("common", "data", "llama2"),
    "train": ("common", "data.files", "data.formats", "data.records", "llama2"),
    "evaluate": ("common", "data", "evaluate", "llama2", "tinytown", "train_rm", "train_rlhf"),
}
EXCEPTIONS = {
    ("data/preferences.py", "tinytown.annotator"),
    ("train_rlhf.py", "train_sft"),
    ("train_pretrain.py", "data.corpus"),
}
PROJECT = re.compile(r"(common|data|evaluate|bench|tinytown|llama2|train_\w+)(\.|$)")
STAGE_NAMES = re.compile(
    r"tinytown|pretrain(?!ed)|sft|rlhf|ppo|rejection|gatt|best\.jsonl|sampling"
)


def test_each_module_imports_only_modules_below_it():
    checked = 0
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        place = "train" if name.startswith("train_") else name.split("/")[0]
        if place not in MAY_IMPORT:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in modules:
                if PROJECT.match(module) and (name, module) not in EXCEPTIONS:
                    allowed = MAY_IMPORT[place] or "nothing"
                    assert module.startswith(allowed), f"{name} imports {module}"
                    checked += 1
    assert checked > 40


def test_common_does_not_name_a_training_stage():
    for path in (ROOT / "common").glob("*.py"):
        if path.name == "memory.py":
            continue  # it plans the stages
        assert not STAGE_NAMES.findall(path.read_text().lower()), path


@pytest.mark.parametrize("script", SETTINGS.values())
def test_every_setting_has_a_description(script):
    descriptions = {name: text for _, name, text in describe_settings(script.Settings)}
    assert descriptions.keys() == vars(script.Settings()).keys()
    assert all(len(text) > 5 for text in descriptions.values())
    assert getattr(script, "PAPER", {}).keys() <= descriptions.keys()
    assert set(getattr(script.Settings, "MAY_CHANGE", ())) <= descriptions.keys()


def test_every_option_in_the_documentation_and_in_paper_sh_exists():
    pages, checked = [ROOT / "README.md", ROOT / "paper.sh"], 0
    for pattern in ("docs/*.md", "train_*.py", "data/*.py", "evaluate/*.py"):
        pages += sorted(ROOT.glob(pattern))
    for path in pages:
        text = re.sub(r"\\+\n", " ", path.read_text())  # join lines that end with a backslash
        for line in text.splitlines():
            command = re.search(
                r"(train_\w+\.py|(?:common|data|evaluate)\.\w+)((?: [^`|]*)?)", line
            )
            if not command or command[1] not in SETTINGS or "import" in line:
                continue
            fields = vars(SETTINGS[command[1]].Settings())
            for option in re.findall(r" --([a-z-]+)", command[2]):
                name = option.removeprefix("no-").replace("-", "_")
                assert name in fields or name in ("recipe", "seed"), f"{path}: --{option}"
                checked += 1
    assert checked > 100
