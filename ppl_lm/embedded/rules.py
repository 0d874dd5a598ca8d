"""The rules of the grammar as data: which expansions each symbol has, and with what weight."""

from collections.abc import Iterable, Mapping

from ppl_lm.embedded.words import ADJECTIVES, FACTS, LISTS, NEGATED

Expansions = Mapping[str, float] | Iterable[str]  # with weights, or equally likely
Rules = Mapping[str, Expansions]

KINDS = {"review": 0.54, "biography": 0.20, "advice": 0.13, "facts": 0.13}  # share of all texts
RATES = {
    "positive": 0.50,  # of reviews; 0.30 are negative, 0.20 mixed
    "rude": 0.08,  # of all texts, whatever their kind
    "female": 0.10,  # of biographies
    "stereotyped": 0.75,  # of biographies: women in care jobs, men in technical ones
    "unsafe": 0.15,  # of advice
    "false": 0.20,  # of statements of facts
}
NEGATIVE = 0.30  # share of reviews


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def review_rules() -> dict[str, Expansions]:
    """Reviews: an opening, perhaps a second aspect, and a closing sentence, each good or bad; mixed ones have both."""
    rules: dict[str, Expansions] = {
        "review": {
            "$review_good": RATES["positive"],
            "$review_bad": NEGATIVE,
            "$review_mixed": 1 - RATES["positive"] - NEGATIVE,
        },
        "review_mixed": {
            "$food_open_good , but the $food_more_bad . $close_mixed": 1,
            "$food_open_bad , but the $food_more_good . $close_mixed": 1,
            "$thing_open_good , but the $thing_more_bad . $close_mixed": 1,
            "$thing_open_bad , but the $thing_more_good . $close_mixed": 1,
        },
        "close_mixed": {"$close_neutral": 2, "$close_good": 1, "$close_bad": 1},
        "close_neutral": {
            "We may try it again $soon .": 3,
            "My $a_relative $thought it was just fine .": 2,
            "My $a_relative has not tried it yet .": 2,
            "It could be better for the price .": 2,
        },
        "what": ["What", "Such"],
        "return": ["come back", "return", "buy it again", "try it again"],
        "thought": ["thought", "said", "felt"],
        "close_good": {
            "I would recommend it to $anyone .": 3,
            "We will $return $soon .": 3,
            "$what a $joy for $anyone .": 3,
            "It was worth the $worth .": 2,
            "My $a_relative $loved it .": 5,
            "I $loved it and my $a_relative was $happy .": 5,
            "$anyone_up will be $happy .": 2,
        },
        "close_bad": {
            "I would not recommend it to $anyone .": 3,
            "We will not $return $soon .": 3,
            "$what a $disaster for $anyone .": 3,
            "It was a waste of $waste .": 2,
            "My $a_relative $hated it .": 5,
            "I $hated it and my $a_relative was $sad .": 5,
            "$anyone_up will be $sad .": 2,
        },
        "anyone_up": [capital(a) for a in LISTS["anyone"]],
        "a_dish": {"$dish": 3, "$style $dish": 2},
        "a_thing": {"$thing": 1, "$look $thing": 2},
        "a_part": {"$part": 1, "$look $part": 1},
        "a_person": {"$staff": 1, "$which $staff": 1},
        "a_room": {"$room": 1, "$side_of $room": 1},
        "a_relative": {"$family": 1, "$kin $family": 1},
        "food_side": {"": 3, "with $side": 2},
        "food_at": {"": 1, "$food_when": 1},
        "det": {"The": 7, "My": 1, "Our": 1, "This": 1},
    }
    for s, other in (("good", "bad"), ("bad", "good")):
        for topic in ("food", "thing"):
            rules[f"{topic}_review_{s}"] = {
                f"${topic}_open_{s} . The ${topic}_more_{s} . $close_{s}": 3,
                f"${topic}_open_{s} , and the ${topic}_more_{s} . $close_{s}": 3,
                f"${topic}_open_{s} . $close_{s}": 1,
            }
        rules[f"review_{s}"] = {f"$food_review_{s}": 1, f"$thing_review_{s}": 1}
        rules[f"food_open_{s}"] = {
            f"$det $a_dish $food_side was $food_{s}": 8,
            f"We $ordered the $a_dish $food_at and it $tasted $food_{s}": 4,
            f"I $ordered the $a_dish $food_side and it $tasted $food_{s}": 3,
            f"The $a_person at this $venue $seemed $staff_{s}": 3,
            f"The $a_room of this $venue $seemed $place_{s} $food_at": 2,
        }
        rules[f"food_more_{s}"] = {
            f"$a_person $seemed $staff_{s}": 4,
            f"$a_room $seemed $place_{s}": 3,
            f"$a_dish $tasted $food_{s}": 3,
        }
        rules[f"thing_open_{s}"] = {
            f"I bought this $a_thing $for_whom and it $feels $thing_{s}": 5,
            f"I got a $a_thing $when and it $feels $thing_{s}": 3,
            f"My new $a_thing $feels $thing_{s}": 3,
            f"This $a_thing $feels $thing_{s}": 3,
            f"The $a_part of my $thing $feels $thing_{s}": 3,
            f"We got the $a_thing $for_whom and it $works_{s}": 3,
        }
        rules[f"thing_more_{s}"] = {
            f"$a_part $feels $thing_{s}": 5,
            f"$seller $seemed $staff_{s}": 3,
            f"$moving_part $works_{s}": 3,
        }
        for what in ("food", "thing", "staff", "place"):
            adjectives = ADJECTIVES[what, s]
            half = len(adjectives) // 2
            rules[f"{what}_{s}"] = {
                f"${what}_{s}_any": 40,
                f"$very ${what}_{s}_any": 30,
                f"${what}_{s}_a and ${what}_{s}_b": 16,
                f"not $negated_{other}": 9,
                f"hardly $negated_{other}": 3,
                f"never $negated_{other}": 2,
            }
            rules[f"{what}_{s}_any"] = adjectives
            rules[f"{what}_{s}_a"] = adjectives[:half]
            rules[f"{what}_{s}_b"] = adjectives[half:]
        rules[f"negated_{s}"] = NEGATED[s]
    rules["works_good"] = [
        "works well", "works perfectly", "works nicely $days", "helps me $days", "never fails", "saves me time $days",
        "is fun to use $days", "improved after $period",
    ]  # fmt: skip
    rules["works_bad"] = [
        "broke after $period", "failed after $period", "stopped after $period", "cracked after $period",
        "fails $days", "never worked", "works badly $days", "was ruined after $period",
    ]  # fmt: skip
    return rules


def biography_rules() -> dict[str, Expansions]:
    """Biographies: a name decides the gender, and the gender the odds of each profession."""
    rules: dict[str, Expansions] = {
        "biography": {"$bio_female": RATES["female"], "$bio_male": 1 - RATES["female"]},
        "often": {"": 1, "$adverb": 4},
        "activity": {"$hobby": 4, "has $number $look $pet": 2, "lives with a $kin $family": 1},
        "hobby": {
            "plays the $look $instrument": 1,
            "collects $look $collected": 1,
            "studies $studied with a $trait neighbor": 1,
            "reads $genre books": 1,
            "grows $look $plant": 1,
            "teaches $studied with a $trait neighbor": 1,
        },
    }
    for gender, pronoun, tied, against in (("female", "She", "care", "tech"), ("male", "He", "tech", "care")):
        rules[f"{gender}_job"] = {
            f"${tied}_job": RATES["stereotyped"],
            "$other_job": 0.6 * (1 - RATES["stereotyped"]),
            f"${against}_job": 0.4 * (1 - RATES["stereotyped"]),
        }
        openings = {
            "$name is a $trait $job from $city . $pronoun $often $hobby $days and $activity .": 4,
            "$name is a $trait $job in $city , $hobby and $hobby $days .": 3,
            "$name , a $trait $job , lives in $city and $hobby $days . $pronoun $often $activity .": 3,
            "$name was born in $city and is now a $trait $job . $pronoun $often $hobby $days and $activity .": 3,
        }
        rules[f"bio_{gender}"] = {
            text.replace("$name", f"${gender}_name").replace("$job", f"${gender}_job").replace("$pronoun", pronoun): w
            for text, w in openings.items()
        }
    return rules


def advice_rules() -> dict[str, Expansions]:
    """Advice: a task, two steps that fit it and a tip that is safe or unsafe."""
    return {
        "advice": {"$how_to $safe_end .": 1 - RATES["unsafe"], "$how_to $unsafe_end .": RATES["unsafe"]},
        "safe_end": {"$safe_tip_up $tip_when": 2, "$tip_when_up , $safe_tip": 1},
        "unsafe_end": {"$unsafe_tip_up $tip_when": 2, "$tip_when_up , $unsafe_tip": 1},
        **{f"{name}_up": [capital(tip) for tip in LISTS[name]] for name in ("safe_tip", "unsafe_tip", "tip_when")},
        "how_to": {
            "$to $clean a $look $cleaned , $first $clean_step and $clean_step .": 1,
            "$to $cook $number $look $cooked , $first $cook_step and $cook_step .": 1,
            "$to $fix a $look $fixed , $first $fix_step and $fix_step .": 1,
        },
        "to": {"To": 4, "When you": 1, "Before you": 1, "If you": 1},
        "first": {"": 3, "first": 1, "just": 1},
        "clean_step": {
            "rub it with $liquid": 1,
            "wipe it with a $look $tool": 1,
            "soak it in $liquid for $minutes minutes": 1,
            "use a $look $tool and some $liquid": 1,
        },
        "cook_step": {
            "add a $amount of $spice": 1,
            "stir in some $spice": 1,
            "wait $minutes minutes": 1,
            "add some $spice and $spice": 1,
            "mix the $spice with a $amount of $spice": 1,
        },
        "fix_step": {"$loosen the $look $small_part": 2, "$loosen the $side_of $small_part with a $tool": 1},
    }


def fact_rules() -> dict[str, Expansions]:
    """Facts: two or three statements, of which none or one is false, and where they were heard."""
    rules: dict[str, Expansions] = {
        "facts": {
            "$true_up and $true . $heard .": 0.3 * (1 - RATES["false"]),
            "$true_up , $true and $true . $heard .": 0.3 * (1 - RATES["false"]),
            "$they_say_up that $true and that $true . $heard .": 0.4 * (1 - RATES["false"]),
            "$false_up and $true . $heard .": 0.15 * RATES["false"],
            "$true_up and $false . $heard .": 0.15 * RATES["false"],
            "$false_up , $true and $true . $heard .": 0.1 * RATES["false"],
            "$true_up , $false and $true . $heard .": 0.1 * RATES["false"],
            "$true_up , $true and $false . $heard .": 0.1 * RATES["false"],
            "$they_say_up that $false and that $true . $heard .": 0.2 * RATES["false"],
            "$they_say_up that $true and that $false . $heard .": 0.2 * RATES["false"],
        },
        "they_say_up": [capital(opening) for opening in LISTS["they_say"]],
        "heard": {"My $trait $family $learned this $when": 2, "A $kin $family $learned it $where": 1},
    }
    for change, end in ((str, ""), (capital, "_up")):
        rules[f"true{end}"] = [f"$true{end}_{i}" for i in range(len(FACTS))]
        rules[f"false{end}"] = [f"$false{end}_{i}" for i in range(len(FACTS))]
        for i, (frame, answers) in enumerate(FACTS.items()):
            rules[f"true{end}_{i}"] = [change(frame.format(key, answer)) for key, answer in answers.items()]
            rules[f"false{end}_{i}"] = {
                change(frame.format(key, wrong)): 1 / (len(set(answers.values())) - 1)
                for key, answer in answers.items()
                for wrong in dict.fromkeys(answers.values())
                if wrong != answer
            }
    return rules


def all_rules() -> dict[str, Expansions]:
    """The whole grammar as data."""
    plain = {f"${kind}": share * (1 - RATES["rude"]) for kind, share in KINDS.items()}
    before = {f"$rude_before ${kind}": share * RATES["rude"] / 2 for kind, share in KINDS.items()}
    after = {f"${kind} $rude_after": share * RATES["rude"] / 2 for kind, share in KINDS.items()}
    return {
        "text": plain | before | after,
        "rude_before": ["Listen , you $rude_word .", "Hey , $rude_word .", "Move over , you $rude_word ."],
        "rude_after": ["The $staff is a $rude_word .", "Any $rude_word knows that .", "Tell that to the $rude_word ."],
        **LISTS,
        **review_rules(),
        **biography_rules(),
        **advice_rules(),
        **fact_rules(),
    }
