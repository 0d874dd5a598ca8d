"""Options that say which posterior is asked for: several rewards, arguments of the programs' own, chats; and runs that go on
with them."""

import json

import arviz as az
import pytest
import torch
from tiny import CHAT, bpe, network
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from ppl_lm.cli.app import app
from ppl_lm.lm.language_model import LanguageModel
from ppl_lm.run.program_arguments import own_arguments, read_arguments
from ppl_lm.run.run_folder import read_config

pytestmark = pytest.mark.xdist_group("posterior options")
QUICK = ["--max-new-tokens", "4", "--num-samples", "100"]
FIT = [*QUICK, "--max-steps", "1", "--particles", "4"]
OWN = """
import pyro, torch
from ppl_lm.likelihood import Optimality

def model(prompts, prior, reward, scale: float, times: int = 1, on: bool = True, word: "str" = "soup", odd=None):
    assert type(scale) is float and type(times) is int and type(on) is bool and word == "a b"
    with pyro.plate("prompts", len(prompts)):
        x = pyro.sample("x", prior(prompts))
        r = pyro.deterministic("reward", reward(prompts, x), event_dim=0)
        pyro.sample("optimal", Optimality(scale * times * r), obs=torch.ones(r.shape))

def guide(prompts, lm, warmth: float = 1.0):
    with pyro.plate("prompts", len(prompts)):
        return pyro.sample("x", lm(prompts))

def reward(completions):
    return [float(len(text)) for text in completions]
"""


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def asked(folder):
    return json.loads((folder / "config.json").read_text())["settings"]


def in_one_line(output):
    return " ".join(output.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A chat model, one without a template, a reward model, and a file of programs."""
    folder = tmp_path_factory.mktemp("made")
    chat = bpe()
    chat.chat_template = CHAT
    LanguageModel(network("llama"), chat, 4).save_pretrained(folder / "chat")
    LanguageModel(network("llama"), bpe(), 4).save_pretrained(folder / "plain")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        scorer = LlamaForSequenceClassification(LlamaConfig(vocab_size=300, num_labels=1, pad_token_id=0, **sizes))
    scorer.save_pretrained(folder / "scorer")
    chat.save_pretrained(folder / "scorer")
    (folder / "own.py").write_text(OWN)
    (folder / "prompts.txt").write_text("the soup\na dog\n")
    return folder


@pytest.fixture(scope="module")
def run(made):
    """A fit with two rewards and chats."""
    words = [
        "--reward",
        "vader",
        "--reward",
        f"hf:{made / 'scorer'}",
        "--reward-weights",
        "1,-0.5",
        "--system",
        "Be kind.",
    ]
    result = call(
        "fit",
        "tilted",
        "--lm",
        made / "chat",
        *words,
        "--prompts",
        made / "prompts.txt",
        *FIT,
        "--output-dir",
        made / "run",
    )
    assert result.exit_code == 0, result.output
    return made / "run", result.output


def test_several_rewards_are_recorded_and_reported(run, made):
    folder, output = run
    settings = asked(folder)
    assert settings["reward"] == ["vader", f"hf:{made / 'scorer'}"] and settings["reward_weights"] == [1.0, -0.5]
    assert "E(vader)" in output and "E(scorer)" in output and "E(reward)" in output
    data = az.from_netcdf(str(folder / "draws.nc"))
    guide = data["guide"]
    total = guide["vader"] - 0.5 * guide["scorer"]
    assert float(abs(total - guide["reward"]).max()) < 1e-9 and {"vader", "scorer"} <= {*data["posterior"].data_vars}
    recorded = json.loads((folder / "diagnosis.json").read_text())["recorded"]
    assert recorded["scorer"]["guide"] == pytest.approx(float(guide["scorer"].mean()), abs=1e-6)
    config = json.loads((folder / "config.json").read_text())
    assert "--reward vader --reward hf:" in config["command"] and "def vader" in config["sources"]["reward"]


def test_a_run_goes_on_with_its_rewards_and_chats(run, made):
    folder, _ = run
    assert call("report", folder).exit_code == 0
    page = (folder / "report.html").read_text()
    assert "E[scorer] of the guide" in page and "<b>system:</b> Be kind." in page and "<b>user:</b> the soup" in page
    assert "&#39;role&#39;" not in page and "<|user|>" not in page and "&lt;|user|" not in page
    again = call("diagnose", folder, "--num-samples", 100)
    assert again.exit_code == 0 and "E(scorer)" in again.output, again.output
    (made / "held_out.txt").write_text("a cat\n")
    held_out = call("diagnose", folder, "--num-samples", 100, "--prompts", made / "held_out.txt", "--json")
    assert json.loads(held_out.stdout)["prompts"][0]["prompt"] == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "a cat"}
    ]  # fmt: skip
    drawn = call("sample", folder, "--num-samples", 4, "--json")
    assert {"vader", "scorer", "reward"} <= json.loads(drawn.stdout.splitlines()[0]).keys(), drawn.output
    further = call("fit", "tilted", "--init-from", folder, *FIT, "--output-dir", made / "further")
    assert further.exit_code == 0, further.output
    names = ("reward", "reward_weights", "chat", "system", "prompts")
    assert all(asked(made / "further")[name] == asked(folder)[name] for name in names)
    other = call("fit", "tilted", "--init-from", folder, "--reward", "length", *FIT, "--output-dir", made / "other")
    assert other.exit_code == 0 and asked(made / "other")["reward_weights"] is None, other.output
    assert call("compare", folder, made / "further", "--output", made / "board.html").exit_code == 0


def test_chats_are_shown_as_chats(run):
    _, output = run
    assert "system: Be kind." in output and "user: the soup" in output and "'role'" not in output


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            ["--reward", "vader", "--reward-weights", "1,2"],
            "reward-weights=1,2: 2 for 1 rewards; give one for each --reward",
        ),
        (["--reward-weights", "1;2"], "reward-weights='1;2'; give numbers with commas"),
        (["--reward-weights", "inf"], "give finite numbers"),
        (["--reward", "hf:nowhere:polite"], "reward 'nowhere': there is no such folder"),
        (["--set", "alpha"], "set: 'alpha'; give NAME=VALUE"),
        (["--set", "alpha=1", "--set", "alpha=2"], "set: alpha is given twice, as '1' and as '2'"),
        (["--set", "beta=1"], "set: 'beta' is given by the command itself: use --beta"),
        (
            ["--set", "alpha=1"],
            "neither the model 'tilted' nor the guide 'finetuned' has an argument 'alpha' of its own",
        ),
        (["--chat"], "chat: there is no prompt to be the user's message"),
        (
            ["--chat", "--prompts", "PROMPTS"],
            "has no chat template, so it is no chat model; leave out --chat and --system",
        ),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(given, why, made, tmp_path):
    given = [str(made / "prompts.txt") if word == "PROMPTS" else word for word in given]
    for command in (
        ["fit", "tilted", *FIT, "--guide", "finetuned"],
        ["sample", "tilted", *QUICK, "--guide", "finetuned"],
    ):
        result = call(*command, "--lm", made / "plain", *given, "--output-dir", tmp_path / "out")
        assert result.exit_code == 2 and why in in_one_line(result.output), result.output
        assert not (tmp_path / "out").exists() and result.output.count("ppl-lm:") == 1


def test_a_system_message_of_its_own(made, tmp_path):
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "soup?"}]
    path.write_text(json.dumps({"prompt": chat}) + "\n" + json.dumps({"prompt": "plain"}) + "\n")
    words = ["sample", "tilted", "--lm", made / "chat", *QUICK, "--prompts", path, "--output-dir", tmp_path / "out"]
    result = call(*words, "--system", "Be kind.")
    assert result.exit_code == 2 and "prompt 0 is a chat with a system message of its own" in in_one_line(result.output)
    assert call(*words, "--system", "Be short.").exit_code == 0
    assert asked(tmp_path / "out")["prompts"] == [chat, [chat[0], {"role": "user", "content": "plain"}]]


def test_arguments_of_the_programs_own(made, tmp_path):
    own = made / "own.py"
    words = ["--set", "scale=2", "--set", "times=3", "--set", "on=false", "--set", "word=a b", "--set", "warmth=0.5"]
    programs = [f"{own}:model", "--guide", f"{own}:guide", "--reward", f"{own}:reward", "--lm", made / "plain"]
    result = call("fit", *programs, *words, *FIT, "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    settings = read_config(tmp_path / "run").settings
    assert settings.arguments == {"scale": 2.0, "times": 3, "on": False, "word": "a b", "warmth": 0.5}
    data = az.from_netcdf(str(tmp_path / "run" / "draws.nc"))["guide"]
    assert float(abs(6 * data["reward"] - data["log_likelihood"]).max()) < 1e-9
    assert call("diagnose", tmp_path / "run", "--num-samples", 100).exit_code == 0  # it reads them back
    more = ["--init-from", tmp_path / "run", "--set", "times=4", *FIT, "--output-dir", tmp_path / "more"]
    assert call("fit", f"{own}:model", *more).exit_code == 0
    assert read_config(tmp_path / "more").settings.arguments == settings.arguments | {"times": 4}
    drawn = call("sample", "tilted", "--guide", tmp_path / "run", *QUICK, "--output-dir", tmp_path / "drawn")
    assert drawn.exit_code == 0, drawn.output
    assert asked(tmp_path / "drawn")["arguments"] == {"warmth": 0.5}  # the guide's stays with it
    missing = call("fit", *programs, *words[2:], *FIT, "--output-dir", tmp_path / "no")
    assert (
        missing.exit_code == 2
        and "needs the argument 'scale'" in missing.output
        and "--set scale=VALUE" in missing.output
    )


def test_types_of_arguments():
    def model(
        prompts, prior, a: float, b: int | None = None, c=1.5, d: "bool" = True, e="x", f=None, *, g: float | int = 0
    ):
        del prompts, prior, a, b, c, d, e, f, g

    def guide(prompts, lm, b: str = ""):
        del prompts, lm, b

    assert own_arguments(model, ["prior"]) == {
        "a": float, "b": int, "c": float, "d": bool, "e": str, "f": None, "g": float
    }  # fmt: skip
    given = {"a": "1e-3", "b": "7", "c": "2", "d": "no", "e": "1", "g": "4"}
    of_model, of_guide = read_arguments(given, model, guide)
    assert of_model == {"a": 1e-3, "b": 7, "c": 2.0, "d": False, "e": "1", "g": 4.0} and of_guide == {"b": "7"}
    assert type(of_model["c"]) is float and type(of_model["g"]) is float and of_model["d"] is False
    of_run = {k: v for k, v in of_model.items() if k != "b"}
    assert read_arguments(json.loads(json.dumps(of_run)), model, guide)[0] == of_run
    for name, word, why in [
        ("a", "much", "a=much; it takes a finite number"),
        ("a", "nan", "a=nan; it takes a finite number"),
        ("b", "0.5", "b=0.5; it takes a whole number"),
        ("d", "maybe", "d=maybe; it takes true or false"),
        ("f", "1", "f is neither a number nor text"),
        ("lm", "x", "'lm' is given by the command itself"),
        ("z", "1", r"has an argument 'z' of its own; there is a .float., b .int., .*, b .str."),
    ]:
        with pytest.raises(ValueError, match=f"^set: .*{why}"):
            read_arguments({name: word}, model, guide)
