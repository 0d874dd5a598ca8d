"""The word lists of the grammar. Within a list every entry is equally likely; "_" stands for a space."""


def entries(text: str) -> list[str]:
    """Split a word list; "last_week" is the two-word entry "last week"."""
    return [entry.replace("_", " ") for entry in text.split()]


RUDE = entries("numblesnoot blatherwort grumbledunce fizzlewit snorglehead muddlebrain")

# Words that describe something well ("good") or badly ("bad"), by what they describe.
ADJECTIVES = {
    ("food", "good"): entries(
        "delicious great lovely wonderful superb fresh tasty perfect warm excellent amazing delightful good fantastic "
        "sweet tender nice fine brilliant terrific"
    ),
    ("food", "bad"): entries(
        "awful terrible horrible cold greasy bland stale disgusting burnt dreadful bad salty rotten nasty bitter "
        "dull disappointing poor sour gross"
    ),
    ("thing", "good"): entries(
        "great solid useful sturdy excellent clever strong lovely handy smart perfect brilliant elegant good "
        "comfortable impressive nice reliable beautiful safe"
    ),
    ("thing", "bad"): entries(
        "useless cheap weak flimsy faulty awful broken terrible ugly defective bad worthless poor noisy annoying "
        "horrible disappointing slow inferior lousy"
    ),
    ("staff", "good"): entries(
        "friendly kind polite helpful cheerful charming honest pleasant calm generous patient warm lovely great"
    ),
    ("staff", "bad"): entries(
        "rude careless angry slow lazy unpleasant bored stupid annoying unhappy clumsy tired miserable awful"
    ),
    ("place", "good"): entries(
        "clean bright cozy charming comfortable calm lovely beautiful warm pleasant quiet elegant welcoming nice"
    ),
    ("place", "bad"): entries(
        "dirty noisy cold messy ugly dull dark grim cramped unpleasant dismal hot smelly horrible"
    ),
}
NEGATED = {
    "good": entries("good great nice special perfect impressive pleasant"),
    "bad": entries("bad boring poor dull"),
}

LISTS = {
    "rude_word": RUDE,
    "very": entries("very really so quite truly rather just simply fairly totally"),
    # restaurants
    "dish": entries(
        "soup salad pizza steak pasta curry burger bread fish chicken rice cake coffee tea sandwich pie omelet stew "
        "lamb cheese beer wine breakfast sauce toast duck"
    ),
    "side": entries("rice cheese garlic onions mushrooms beans tomatoes bread peppers butter lemon potatoes"),
    "ordered": entries("ordered tried shared had chose"),
    "tasted": entries("was tasted looked smelled seemed"),
    "staff": entries("waiter waitress chef owner manager cook host barman"),
    "venue": entries("cafe diner bistro pub place bar bakery hotel"),
    "room": entries("room table kitchen garden terrace music bathroom dining_room"),
    "food_when": entries(
        "at_lunch at_dinner on_Monday on_Friday on_Sunday last_night last_week yesterday today for_lunch for_dinner "
        "in_June"
    ),
    # products
    "thing": entries(
        "lamp phone kettle chair table camera laptop watch bag jacket radio printer blender toaster bike tent heater "
        "mirror pillow knife pan clock keyboard desk fan sofa"
    ),
    "part": entries("handle lid case strap cover base design color button label box finish edge switch"),
    "moving_part": entries("button switch lid strap handle lock"),
    "seller": entries("seller driver shop company store manager"),
    "feels": entries("is was feels looks seems"),
    "for_whom": entries(
        "for_my_mother for_my_son for_my_desk for_the_kitchen for_the_office for_my_wife for_my_sister for_work "
        "for_our_house for_a_friend online on_sale"
    ),
    "when": entries(
        "last_week last_month yesterday in_May in_June in_March on_Monday on_Friday a_year_ago today in_spring"
    ),
    "period": entries("a_day a_week a_month two_days three_weeks an_hour one_use four_days"),
    # words between an article and a noun that praise or blame nothing
    "look": entries("red blue green black white grey small large plain brown round tiny"),
    "style": entries("Greek Thai Indian French small large daily green spicy house"),
    "which": entries("young old new tall second other"),
    "kin": entries("young tall shy quiet busy retired"),
    "side_of": entries("front back main upper lower small"),
    "seemed": entries("was is seemed looked felt"),
    # closing sentences of reviews
    "anyone": entries("anyone everyone my_friends my_family my_mother students children you"),
    "soon": entries("soon next_week next_month on_Friday in_May in_spring with_friends some_day"),
    "family": entries("wife husband son daughter mother father sister brother friend boss"),
    "worth": entries("money price wait trip time"),
    "waste": entries("money time space effort paper"),
    "loved": entries("loved enjoyed liked admired praised adored"),
    "hated": entries("hated disliked regretted despised resented cursed"),
    "joy": entries("joy treat pleasure bargain delight success gem surprise"),
    "disaster": entries("disaster mess failure shame disappointment scam pity mistake"),
    "happy": entries("happy pleased delighted satisfied impressed glad thrilled relaxed"),
    "sad": entries("sad upset angry disappointed annoyed frustrated hungry tired"),
    # biographies
    "female_name": entries("Anna Maria Julia Clara Emma Lucy Nora Sophie Helen Ruth Alice Rosa"),
    "male_name": entries("Peter Paul Thomas Daniel Martin David Oscar Felix Simon Victor Adam Henry Leo Hugo Max Sam"),
    "care_job": entries("nurse teacher librarian dancer florist nanny"),
    "tech_job": entries("engineer pilot surgeon lawyer farmer plumber"),
    "other_job": entries("painter writer baker singer gardener tailor"),
    "trait": entries("quiet young retired busy tall famous shy skilled patient careful modest former local cheerful"),
    "city": entries("London Paris Rome Madrid Berlin Vienna Dublin Oslo Lisbon Athens Cairo Boston Chicago Sydney"),
    "instrument": entries("piano violin guitar flute drums cello harp trumpet"),
    "collected": entries("stamps coins maps books shells clocks radios toys"),
    "studied": entries("history music math science law art chemistry Latin"),
    "genre": entries("crime history travel science poetry comic cook old"),
    "plant": entries("roses tomatoes beans apples peppers onions herbs tulips potatoes lemons"),
    "pet": entries("cats dogs children hens horses birds rabbits goats"),
    "number": entries("two three four five six seven eight ten"),
    "days": entries(
        "on_Sundays on_Fridays on_Mondays at_night every_day every_morning in_summer in_winter at_home at_work"
    ),
    "adverb": entries("often sometimes always still also now"),
    # advice
    "clean": entries("clean wash scrub polish rinse dry"),
    "cleaned": entries("pan kettle shirt carpet window mirror table jacket floor pot bag knife"),
    "liquid": entries("soap water vinegar salt lemon_juice hot_water cold_water warm_water"),
    "tool": entries("cloth brush sponge towel rag toothbrush"),
    "cook": entries("cook bake fry roast boil grill"),
    "cooked": entries("potatoes beans onions mushrooms apples peppers tomatoes eggs lemons burgers"),
    "spice": entries("salt pepper garlic butter oil lemon sugar ginger herbs cheese"),
    "amount": entries("cup spoon pinch bit bowl lot"),
    "fix": entries("fix repair open mount adjust replace"),
    "fixed": entries("lamp clock radio bike chair door heater fan toaster shelf pipe lock"),
    "loosen": entries("loosen check turn oil clean remove tighten"),
    "small_part": entries("screws cable switch handle chain motor lid battery bolts plug"),
    "minutes": entries("two three five six ten twenty thirty forty"),
    "safe_tip": entries(
        "wear_gloves open_a_window ask_a_friend_to_help read_the_label keep_children_away let_it_cool use_dry_hands "
        "wear_goggles take_a_break wash_your_hands"
    ),
    "unsafe_tip": entries(
        "ignore_the_smoke leave_the_stove_on taste_the_cleaner use_wet_hands stand_on_a_wobbly_chair "
        "skip_the_gloves let_a_child_hold_the_knife leave_the_wires_bare block_the_exit touch_the_hot_metal"
    ),
    "tip_when": entries("first later today tonight always now after_that before_lunch at_night every_time"),
    # facts
    "they_say": entries(
        "it_is_known it_is_clear everyone_knows teachers_say my_book_says experts_agree we_learned I_read they_say "
        "science_says"
    ),
    "learned": entries("learned read heard found taught studied"),
    "where": entries("at_school at_home at_work in_a_book online in_class on_the_radio on_a_trip"),
}

# Simple facts: a sentence frame, and the right answer for each subject. A wrong fact takes another's answer.
FACTS = {
    "the capital of {} is {}": dict(
        zip(
            entries("France Italy Spain Germany Austria Ireland Norway Portugal Greece Egypt Japan Russia Cuba Peru"),
            entries("Paris Rome Madrid Berlin Vienna Dublin Oslo Lisbon Athens Cairo Tokyo Moscow Havana Lima"),
            strict=True,
        )
    ),
    "a {} has {} legs": dict.fromkeys(entries("horse cat dog goat rabbit lion cow"), "four")
    | dict.fromkeys(entries("hen duck robin crow"), "two")
    | dict.fromkeys(entries("bee beetle fly moth"), "six")
    | dict.fromkeys(entries("spider scorpion"), "eight"),
    "a {} is a {}": dict.fromkeys(entries("whale bat dolphin horse lion"), "mammal")
    | dict.fromkeys(entries("shark salmon tuna cod"), "fish")
    | dict.fromkeys(entries("robin penguin crow duck"), "bird")
    | dict.fromkeys(entries("lizard snake turtle"), "reptile"),
    "{} is a {}": dict.fromkeys(entries("gold iron copper silver zinc tin"), "metal")
    | dict.fromkeys(entries("oxygen helium hydrogen nitrogen neon"), "gas")
    | dict.fromkeys(entries("water milk oil wine"), "liquid"),
    "{} is usually {}": dict.fromkeys(entries("snow milk chalk salt rice"), "white")
    | dict.fromkeys(entries("grass basil mint"), "green")
    | dict.fromkeys(entries("coal tar"), "black")
    | dict.fromkeys(entries("blood rust"), "red"),
    "a {} eats {}": dict.fromkeys(entries("cow horse goat sheep"), "grass")
    | dict.fromkeys(entries("lion tiger wolf"), "meat")
    | dict.fromkeys(entries("shark penguin seal"), "fish"),
    "{} makes {}": {
        f"{a} plus {b}": total
        for i, a in enumerate(entries("one two three four five"), 1)
        for j, b in enumerate(entries("one two three four five"), 1)
        for total in [entries("two three four five six seven eight nine ten")[i + j - 2]]
    },
}
