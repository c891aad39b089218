"""Word lists for generated text: names for keys, and what the prose grammar speaks of. No word is in two lists."""

# Keys and places: concrete nouns that do not occur in the generated prose, so a needle's key is met nowhere else.
KEYS = tuple(
    """
    amber anchor apple arrow atlas badge bagel bamboo banjo barrel basil basket beacon beaver bishop bison blade
    blanket blossom bonnet bottle boulder bracket branch brass breeze bridle bronze bucket buckle buffalo bugle butter
    button cabin cactus camel camera candle canoe canvas canyon carbon cargo carpet carrot castle cedar cello chalk
    cherry chestnut chimney cider cinder circus citron clover cobalt cobra coffee comet compass copper coral cotton
    cougar coyote cradle crane crater cricket crown crystal cypress dagger daisy denim desert diamond dolphin donkey
    dragon drum eagle easel echo ember emerald engine envelope falcon feather fennel ferret fiddle flamingo flannel
    flute fossil fountain fox galaxy garlic garnet gazelle geyser ginger giraffe glacier globe goblet goose gopher
    granite grape gravel hammer hammock harbor harp hazel helmet heron hickory honey hornet iceberg igloo indigo iris
    island ivory jacket jaguar jasmine jelly jewel jungle kayak kernel kettle kitten ladder lagoon lantern laurel
    lavender lemon leopard lettuce lilac linen lizard lobster locket lotus magnet magnolia mango mantle maple marble
    medal melon mercury meteor mitten monkey mosaic mountain muffin mustard needle nickel nutmeg oak oasis ocean olive
    onion opal orange orbit orchid otter oyster paddle palace panda panther paper parrot peach peacock pearl pebble
    pelican pepper piano pigeon pillow pine pirate pistol planet plum pocket pony poppy prairie prism puffin pumpkin
    puzzle quartz quilt rabbit raccoon radish raven ribbon robin rocket rose ruby saddle saffron salmon sandal sapphire
    scarf shadow shamrock silver spider spruce squirrel statue sulfur sunset swan sword tablet teapot temple thistle
    thunder tiger timber tomato topaz torch trumpet tulip tunnel turquoise turtle umbrella vanilla velvet violet violin
    volcano wagon walnut walrus whistle willow window winter wizard yellow zebra zinc
    """.split()
)

PEOPLE = tuple(
    """
    Alice Bernard Clara David Edith Frank Grace Henry Irene James Kate Louis Mary Nathan Olga Peter Rachel Simon Thomas
    Walter
    """.split()
)
ROLES = tuple(
    """
    baker captain carpenter clerk doctor driver farmer gardener guard judge lawyer merchant miller nurse painter
    porter priest sailor servant soldier student tailor teacher traveller widow writer
    """.split()
)
PLACES = tuple(
    """
    barn bridge church corner court farm field forest garden gate hall hill house inn kitchen library market meadow
    mill office park river road room school shop square stable station street tower town valley village yard
    """.split()
)
THINGS = tuple(
    """
    bag bed bell book box bread chair clock coat coin cup door dress fence fire flower glass hat horse key knife
    lamp letter map mirror money picture plate pot ring rope shoe stone table tree wall wheel
    """.split()
)
ADJECTIVES = tuple(
    """
    big bright broken clean cold dark dry early empty fine good great green grey heavy high large late light little
    long low narrow new old plain poor quiet red rich round small soft strange strong thin warm white wide wild young
    """.split()
)
VERBS = tuple(
    """
    bought brought carried cleaned dropped fetched followed found forgot gave held hid kept left liked lost moved
    noticed opened painted passed praised pulled remembered repaired saw sold stole took touched wanted washed watched
    """.split()
)
TIMES = tuple(
    """
    morning evening afternoon night Monday Tuesday Wednesday Thursday Friday Saturday Sunday spring summer autumn
    """.split()
)
