"""The words of the little world: who and what there is. Plain data, chosen by hand; chance only
links them later."""

# ruff: noqa: SIM905 (lists of words read best as words)
from __future__ import annotations

WOMEN = (
    "Ada Anna Bella Clara Dora Edith Emma Eva Flora Greta Hanna Ida Julia Lena Lily Maria "
    "Nora Olga Rosa Ruth Sara "
    "Tilda Vera Zoe"
).split()
MEN = (
    "Adam Anton Basil Boris Carl David Emil Eric Felix Frank George Hans Henry Hugo Jack Leo "
    "Mark Oscar Otto Paul "
    "Peter Simon Tom Victor"
).split()

TOWNS = (
    "Ashford Barton Calder Dunmore Elmswick Fairhill Glenby Harwick Inverley Kelso Larkham "
    "Marlow Norby Oakton "
    "Penrose Redcliff Selby Thornley Upwell Westbury"
).split()
REGIONS = ("north", "south", "east", "west")
SITES = ("river", "lake", "coast", "forest", "hills", "plain", "marsh", "valley")
PRODUCTS = ("cheese", "honey", "cloth", "salt", "wine", "bells", "boats", "roses", "pots", "knives")

# job: (place of work, tool)
JOBS = {
    "baker": ("bakery", "oven"),
    "smith": ("forge", "anvil"),
    "teacher": ("school", "chalk"),
    "doctor": ("clinic", "syringe"),
    "farmer": ("field", "plough"),
    "fisher": ("harbour", "net"),
    "miller": ("mill", "sieve"),
    "tailor": ("workshop", "needle"),
    "cook": ("kitchen", "knife"),
    "gardener": ("garden", "spade"),
    "painter": ("studio", "brush"),
    "judge": ("court", "gavel"),
    "sailor": ("ship", "compass"),
    "shepherd": ("meadow", "staff"),
    "miner": ("mine", "drill"),
    "clerk": ("office", "pen"),
    "singer": ("theatre", "microphone"),
    "guard": ("castle", "whistle"),
    "nurse": ("hospital", "bandage"),
    "carpenter": ("yard", "saw"),
}

FOODS = (
    "bread soup cheese rice fish cake eggs beans honey pears plums nuts pie carrots onions cherries"
).split()
HOBBIES = (
    "chess swimming dancing reading sewing painting singing hiking skating cooking fishing drawing"
).split()
PETS = "goat dog cat owl hen duck parrot rabbit pony turtle goose lamb".split()
BELONGINGS = (
    "boat cart mill barn piano tent clock bicycle sledge drum violin shop well canoe orchard wagon"
).split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)
COLOURS = "red blue green yellow black white brown grey".split()

# thing: (material, where it is kept)
THINGS = {
    "jug": ("glass", "kitchen"),
    "bottle": ("glass", "cellar"),
    "lamp": ("glass", "hall"),
    "mirror": ("glass", "bedroom"),
    "vase": ("glass", "parlour"),
    "pot": ("clay", "kitchen"),
    "bowl": ("clay", "cupboard"),
    "plate": ("clay", "cupboard"),
    "cup": ("clay", "kitchen"),
    "tile": ("clay", "shed"),
    "chair": ("wood", "parlour"),
    "spoon": ("wood", "drawer"),
    "box": ("wood", "attic"),
    "flute": ("wood", "bedroom"),
    "ladder": ("wood", "shed"),
    "key": ("iron", "drawer"),
    "hammer": ("iron", "shed"),
    "pan": ("iron", "kitchen"),
    "bell": ("iron", "hall"),
    "hook": ("iron", "cellar"),
    "scarf": ("wool", "chest"),
    "blanket": ("wool", "bedroom"),
    "sock": ("wool", "drawer"),
    "hat": ("wool", "hall"),
    "glove": ("wool", "chest"),
    "letter": ("paper", "drawer"),
    "book": ("paper", "parlour"),
    "map": ("paper", "chest"),
    "kite": ("paper", "attic"),
    "card": ("paper", "cupboard"),
    "boot": ("leather", "cellar"),
    "belt": ("leather", "chest"),
    "bag": ("leather", "hall"),
    "saddle": ("leather", "shed"),
    "purse": ("leather", "bedroom"),
    "candle": ("wax", "cupboard"),
    "seal": ("wax", "parlour"),
    "doll": ("wax", "attic"),
    "ring": ("silver", "chest"),
    "coin": ("silver", "cellar"),
    "crown": ("silver", "attic"),
    "medal": ("silver", "parlour"),
    "basket": ("straw", "shed"),
    "mat": ("straw", "hall"),
    "broom": ("straw", "attic"),
}
MATERIALS = "glass clay wood iron wool paper leather wax silver straw".split()

# animal: (what it eats, where it sleeps, number of legs in words)
ANIMALS = {
    "goat": ("grass", "stable", "four"),
    "dog": ("meat", "kennel", "four"),
    "cat": ("mice", "house", "four"),
    "owl": ("mice", "tower", "two"),
    "hen": ("corn", "coop", "two"),
    "duck": ("weeds", "pond", "two"),
    "parrot": ("seeds", "cage", "two"),
    "rabbit": ("carrots", "burrow", "four"),
    "pony": ("hay", "stable", "four"),
    "turtle": ("weeds", "pond", "four"),
    "goose": ("grass", "coop", "two"),
    "lamb": ("hay", "barn", "four"),
    "bear": ("honey", "cave", "four"),
    "fox": ("meat", "burrow", "four"),
    "spider": ("flies", "web", "eight"),
    "bat": ("flies", "cave", "two"),
    "bee": ("nectar", "hive", "six"),
    "ant": ("seeds", "nest", "six"),
    "frog": ("flies", "marsh", "four"),
    "crow": ("corn", "nest", "two"),
}

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
COUNTED = "apples nuts coins eggs books stones shells cards".split()
OPENERS = (
    "One morning",
    "One evening",
    "Last week",
    "On Monday",
    "On Sunday",
    "In spring",
    "In winter",
    "Yesterday",
)


def article(noun: str) -> str:
    """``noun`` with its indefinite article: "an owl", "a goat"."""
    # every noun of the lexicon sounds as it is spelled: no hour, no unicorn
    if noun[0] in "aeiou":
        return f"an {noun}"
    return f"a {noun}"


def is_woman(name: str) -> bool:
    """Whether a person is a woman; all others are men."""
    return name in WOMEN


def subject_pronoun(name: str) -> str:
    """Return "she" or "he"."""
    if is_woman(name):
        return "she"
    return "he"


def possessive_pronoun(name: str) -> str:
    """Return "her" or "his"."""
    if is_woman(name):
        return "her"
    return "his"
