"""Words to sort, spell and reverse: common English ones, and made-up ones so that letters are read and not words."""

from __future__ import annotations

from random import Random

from compose.demo.held_out import Split

# No word here stands in a phrasing: those are single tokens, and a single token shows no letters.
ENGLISH = tuple(
    """
     acid acorn actor adult again agent alarm album alley almond alpha amber angel anger ankle apple 
    apron arena armor arrow artist aspen atlas attic aunt autumn avenue badge bagel baker bamboo banana bandit banjo
    banner barley barn barrel basil basket beach beacon beard beast beauty beaver bee beetle bell belt bench berry
    bird bishop biscuit blanket blossom board boat bone bonfire boot border bottle bowl branch brass bread breeze
    brick bridge bronze brother brush bubble bucket buffalo butter button cabin cable cactus cake camel camera camp
    canal candle candy canoe canvas captain carbon card cargo carpet carrot cart castle cat cattle cave cedar cellar
    cello chain chair chalk cherry chess chest chicken chimney circle circus citizen clay cliff clock cloud clover
    coach coal coast coat cobra cocoa coffee coin collar comet compass copper coral corn corner cotton couch cousin
    crab crane cream cricket crow crown crystal cup curtain cushion daisy dance dawn deer desert desk diamond dinner
    doctor dog dolphin donkey door dragon drawer dream drum duck dust eagle earth east echo elbow elephant ember engine
     eye fabric falcon family farm farmer father feather fence fern ferry fiddle field fig finger fire fish
    flag flame flour flower flute foam fog forest fork fossil fountain fox frog frost fruit galaxy garage garden
    garlic gate ghost giant ginger giraffe glacier glass globe glove goat gold goose grain granite grape grass
    gravel guitar hammer hammock hand harbor harp harvest hat hawk hazel heart hedge helmet herb hero heron hill
    honey hook horizon horse hotel house hunter ice igloo insect iron island ivory jacket jaguar jam jelly jewel
    jungle juniper kettle kidney king kitchen kite kitten knee knife knight ladder lake lamp lantern laptop laurel
    lava leaf leather lemon lentil leopard lettuce library lime linen lion lizard lobster locket lotus lumber machine
    magnet mango mantle maple marble market mask meadow melon metal mill mint mirror monkey moon moss mother
    motor mountain mouse mud museum mustard napkin needle nephew nest nickel night north nose notebook nurse nut oak
    oasis oat ocean office olive onion orange orbit orchard orchid organ otter oven owl oyster paddle page palace palm
    panda panther paper parade parrot path peach peanut pear pearl pebble pelican pencil pepper piano picnic pig
    pigeon pillow pilot pine pirate pizza planet plaza plum pocket pond pony poppy potato powder prince puddle
    pumpkin puppy puzzle quail quartz queen quilt rabbit radar radio radish raft rain rainbow raven ribbon rice river
    robin robot rocket roof room rooster rope rose ruby saddle sail salad salmon salt sand sandal satin saucer scarf
    school scissors scooter seal season shadow shark sheep shell shelter ship shirt shoe shovel silk silver singer
    sister sky sled smoke snail snake snow soap sock sofa soup south spade sparrow spider spinach spoon spring
    spruce squid squirrel stable star station statue stone storm stove stream street sugar summer sun sunset swan
    sweater swing sword table tailor tea teacher temple tennis tent theater thistle thorn throne thumb thunder ticket
    tiger timber toast tomato tooth tower train trumpet trunk tulip tunnel turkey turtle twig umbrella uncle
    valley vanilla velvet violet violin volcano wagon walnut walrus water weather west whale wheat wheel whistle
    willow window winter wizard wolf wood wool yacht yard yarn yellow yogurt zebra zipper cheese 
    """.split()
)

ENGLISH_SHARE = 0.35
_VOWELS = "aeiouaeiouaeioy"
_CONSONANTS = "bcdfghjklmnprstvwbcdglmnprstbdlmnrstxzqk"


def word_key(word: str) -> str:
    """Returns what the split is decided by."""
    return f"word {word}"


def draw_word(random: Random, split: Split, max_letters: int) -> str:
    """Returns a word of 3 to `max_letters` letters of that split; held-out ones are English, as people ask."""
    while True:
        if split is Split.HELD_OUT or random.random() < ENGLISH_SHARE:
            word = random.choice(ENGLISH)
        else:
            word = _make_up(random, random.randint(3, max_letters))
        if 3 <= len(word) <= max_letters and split.allows_content((word_key(word),)):
            return word


def _make_up(random: Random, num_letters: int) -> str:
    letters: list[str] = []
    is_vowel = random.random() < 0.3
    while len(letters) < num_letters:
        letters.append(random.choice(_VOWELS if is_vowel else _CONSONANTS))
        # Doubled letters are what reversing and counting get wrong: they occur more often than in English.
        if random.random() < 0.12:
            letters.append(letters[-1])
        is_vowel = not is_vowel if random.random() < 0.8 else is_vowel
    return "".join(letters[:num_letters])
