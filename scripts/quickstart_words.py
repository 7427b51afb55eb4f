"""The hand-written words from which `make_quickstart_data.py` builds the text and the product list."""

# A section head is `= department | where it is kept | what stands near it`. A line is
# `kind Noun | looks | uses | varieties`; kind is s (mass noun), a (one thing) or p (plural).
GOODS = """
= dairy eggs | in the fridge, on the cold shelf, in the cool larder, beside the milk jug | cow, farm, jug, cooler, fridge door
s Milk | white, cold, fresh | pour it into a glass, drink it before bed, warm it in a pan | Whole, Skimmed, Oat, Goat
s Cheese | yellow, soft, salty | slice it for a sandwich, grate it over the pasta, eat it with grapes | Cheddar, Gruyère, Goat, Smoked
s Butter | soft, pale, salty | spread it on warm bread, melt it in the pan, leave it out to soften | Salted, Unsalted, Whipped
s Yogurt | thick, cool, sour | eat it with a spoon, stir honey into it, mix it with berries | Greek, Vanilla, Strawberry, Plain
s Cream | thick, sweet, white | whip it for the cake, pour it over the fruit, stir it into the soup | Double, Whipping, Sour
p Eggs | brown, round, fragile | boil them for six minutes, crack them into a bowl, beat them with a fork | Brown, Free Range, Large White
s Buttermilk | sour, thin, cold | use it for pancakes, drink it on a hot day, whisk it with flour | Cultured, Low Fat, Farm
s Kefir | sour, cool, fizzy | drink it in the morning, shake it first, pour it over oats | Plain, Peach, Cherry
s Crème Fraîche | smooth, sour, thick | stir it into the sauce, spoon it on the soup, eat it with fish | Light, Full Fat, Herb
= frozen | in the freezer, at the bottom of the freezer, in the ice box, behind the glass freezer door | ice, frost, freezer, gloves, cold air
s Ice Cream | sweet, icy, creamy | scoop it into a cone, eat it before it melts, share it on a hot day | Vanilla, Chocolate, Mint, Strawberry
s Sorbet | icy, fruity, bright | scoop it into a cup, eat it after dinner, let it thaw a little | Lemon, Mango, Raspberry
p Ice Pops | icy, bright, sweet | lick them in the sun, share them with the children, hold them by the stick | Cherry, Lime, Rainbow
p Ice Cubes | clear, icy, hard | drop them into a drink, put them on a bump, crush them in a cloth | Party, Clear, Crushed
p Fish Fingers | crisp, icy, golden | bake them from the freezer, eat them with peas, dip them in sauce | Cod, Breaded, Chunky
p Oven Chips | thin, icy, golden | bake them until they are crisp, shake them with salt, thaw them in the oven | Crinkle Cut, Thick Cut, Sweet Potato
s Pizza | round, flat, icy | bake it in the hot oven, cut it in eight, take it out of the box | Mushroom, Four Cheese, Spinach
p Frozen Peas | green, small, icy | boil them for a minute, pour them from the bag, put the cold bag on a knee | Garden, Sweet, Petite
p Frozen Berries | red, icy, mixed | thaw them in a bowl, mix them with oats, keep them for winter | Summer, Forest, Mixed
= household | under the sink, in the cleaning cupboard, in the laundry room, behind the kitchen door | bucket, mop, floor, washing line, rubber gloves
s Dish Soap | green, slippery, soapy | wash the plates with it, squeeze it into the sink, make bubbles with it | Lemon, Apple, Aloe
s Laundry Powder | white, dusty, clean | pour it into the washing machine, measure it with a cup, wash shirts with it | Color, White, Sensitive
p Sponges | soft, wet, yellow | scrub the pots with them, wring them out, wipe the table with them | Kitchen, Scrub, Cellulose
p Paper Towels | white, thin, strong | wipe up the water with them, tear them from the roll, dry hands on them | Two Ply, Jumbo, Recycled
p Trash Bags | black, big, strong | tie them at the top, carry them to the bin, fill them with rubbish | Tall, Drawstring, Bin Liner
s Bleach | strong, sharp, clear | clean the tiles with it, keep it away from children, rinse it away | Thick, Pine, Citrus
a Broom | long, stiff, wooden | sweep the floor with it, lean it on the wall, chase dust with it | Corn, Soft, Outdoor
p Light Bulbs | round, bright, warm | screw them into the lamp, switch them on at dusk, hold them with care | LED, Soft White, Candle
p Candles | tall, waxy, warm | light them with a match, blow them out, put them on the table | Beeswax, Vanilla, Tea
= fruit vegetables | in the fruit bowl, in a wooden crate, in the garden, on the market stall | tree, basket, leaves, soil, market stall
p Apples | red, crisp, sweet | pick them from the tree, peel them for a pie, bite into them | Gala, Green, Cooking
p Bananas | yellow, ripe, soft | peel them, mash them with a fork, hang them on a hook | Ripe, Fair Trade, Baby
p Carrots | orange, crunchy, long | pull them from the soil, chop them for the stew, peel them in the sink | Baby, Purple, Bunched
p Potatoes | brown, muddy, round | dig them up, boil them with salt, mash them for dinner | Red, Baking, New
p Tomatoes | red, juicy, ripe | slice them for a salad, pick them from the vine, squeeze them | Cherry, Plum, Vine
s Spinach | green, leafy, fresh | wash it twice, cook it until it shrinks, toss it in a salad | Baby, Curly, Washed
p Onions | round, strong, papery | chop them with wet eyes, fry them until they are golden, hang them in a net | Red, Sweet, Spring
p Mushrooms | brown, soft, earthy | brush the soil off them, fry them with garlic, find them in the wood | Button, Chestnut, Oyster
p Jalapeños | green, hot, small | chop them with gloves on, hide them in the salsa, taste them with care | Fresh, Red, Fiery
= bakery | in the bread bin, on the baker's rack, in a paper bag, by the warm oven | baker, flour, oven, dough, paper bag
s Bread | warm, brown, crusty | slice it for toast, tear it by hand, dip it in the soup | Rye, White, Sourdough
p Rolls | round, soft, warm | cut them in half, fill them with ham, bake them at dawn | Dinner, Poppy Seed, Brioche
p Bagels | round, chewy, brown | toast them, cut them across the middle, bake them in a row | Sesame, Onion, Plain
p Croissants | flaky, golden, light | break them apart, dip them in coffee, buy them warm | Almond, Butter, Mini
a Cake | sweet, tall, soft | cut it for the guests, put candles on it, bake it for a birthday | Carrot, Lemon, Chocolate
p Muffins | soft, round, sweet | bake them in paper cups, eat them for breakfast, share them with a friend | Blueberry, Banana, Bran
p Donuts | round, sticky, sweet | dust them with sugar, fill them with jam, eat them with sticky hands | Glazed, Jam, Cinnamon
a Baguette | long, crusty, golden | carry it under an arm, break it in two, spread butter on it | Stone Baked, Wheat, Half
a Pie | round, golden, hot | bake it in a tin, cut it in eight, cool it on the sill | Apple, Cherry, Pumpkin
= drinks | in the drinks crate, on the bar, in a tall bottle, in the picnic cooler | glass, straw, bottle, cup, thirsty people
s Juice | sweet, cold, bright | pour it into a glass, drink it through a straw, squeeze it from fruit | Orange, Apple, Tomato
s Lemonade | sour, sweet, cold | sell it at the gate, pour it over ice, drink it on the porch | Pink, Cloudy, Ginger
s Coffee | black, hot, strong | brew it in the morning, sip it slowly, grind the beans for it | Ground, Dark Roast, Café
s Tea | hot, brown, mild | pour it from the pot, sip it from a cup, let it steep | Green, Black, Mint
s Water | clear, cold, still | drink it after a run, fill the bottle with it, pour it for a guest | Spring, Sparkling, Mineral
s Cola | brown, fizzy, sweet | open it with a hiss, drink it from a can, pour it over ice | Diet, Cherry, Classic
s Cocoa | hot, brown, sweet | stir it in a mug, drink it after the snow, blow on it first | Dark, Instant, Creamy
s Cider | golden, fizzy, dry | pour it from the barrel, drink it in autumn, press it from fruit | Dry, Pear, Mulled
s Soda | fizzy, cold, bright | drink it from a bottle, shake it by mistake, pour it into a cup | Lime, Orange, Grape
= snacks | in the snack tin, in a lunch box, in the party bowl, next to the film and the sofa | sofa, film, party, bowl, lunch box
p Crisps | thin, salty, crunchy | crunch them loudly, share the bag, pour them into a bowl | Sea Salt, Cheese, Vinegar
s Popcorn | light, salty, warm | eat it at the film, pop it in a pan, spill it on the sofa | Butter, Caramel, Sweet
p Pretzels | salty, twisted, brown | snap them in two, dip them in mustard, eat them by the handful | Salted, Mini, Honey
p Crackers | thin, dry, crisp | put cheese on them, snap them in half, pack them for a trip | Rye, Cheese, Water
p Cookies | sweet, round, crunchy | dunk them in milk, hide them in the tin, share them after school | Oat, Ginger, Chocolate Chip
s Chocolate | dark, sweet, smooth | break it into squares, let it melt on the tongue, hide it from the children | Dark, Mint, Hazelnut
p Peanuts | small, salty, brown | shell them by the fire, eat them by the handful, feed a few to a bird | Roasted, Salted, Spicy
p Gummies | soft, bright, chewy | chew them slowly, sort them by color, share them in the car | Sour, Bear, Fruit
p Granola Bars | chewy, sweet, nutty | pack them for school, eat them on the bus, unwrap them quietly | Almond, Coconut, Peanut
= meat fish | on the butcher's hook, on the butcher's block, on ice at the quay, in the smokehouse | butcher, knife, grill, boat, net
s Beef | red, tender, lean | roast it on Sunday, cut it for a stew, brown it in a pan | Minced, Roasting, Stewing
s Chicken | pale, tender, plain | roast it with lemon, grill it in the yard, carve it at the table | Whole, Boneless, Free Range
s Bacon | salty, thin, crisp | fry it until it curls, smell it from the stairs, eat it in a roll | Smoked, Streaky, Back
s Ham | pink, salty, sweet | slice it thin, bake it with honey, carve it for the guests | Honey, Cooked, Country
p Sausages | fat, brown, hot | turn them on the grill, fry them in a pan, prick them with a fork | Pork, Herb, Cumberland
s Salmon | pink, fresh, oily | grill it with lemon, smoke it over wood, catch it in the river | Smoked, Wild, Pink
s Tuna | dark, firm, fresh | sear it quickly, slice it on a board, land it on the boat | Yellowfin, Steak Cut, Line Caught
p Shrimp | pink, small, curled | peel them by hand, boil them in the pot, catch them in a net | King, Tiger, Peeled
s Lamb | red, tender, rich | roast it with mint, stew it for hours, cut it from the bone | Leg of, Diced, Spring
= body care | on the bathroom shelf, in the wash bag, beside the bath, in front of the mirror | mirror, bath, towel, skin, wet hair
s Shampoo | soapy, thick, sweet | rub it into wet hair, rinse it out, keep it out of the eyes | Herbal, Baby, Coconut
s Toothpaste | minty, white, smooth | squeeze it onto the brush, brush with it twice a day, spit it out | Mint, Whitening, Children's
a Toothbrush | small, soft, blue | brush every tooth with it, rinse it in the sink, change it in spring | Soft, Travel, Bamboo
s Hand Lotion | creamy, cool, smooth | rub it into dry skin, use it in winter, squeeze it from the tube | Aloe, Almond, Rose
p Razors | sharp, thin, clean | shave with them, rinse them well, keep them away from children | Five Blade, Safety, Sensitive
s Sunscreen | white, oily, thick | rub it on the nose, pack it for the beach, put it on before noon | Water Resistant, Kids, Mineral
s Lip Balm | waxy, small, smooth | put it on dry lips, carry it in a pocket, use it in the wind | Honey, Cherry, Beeswax
s Conditioner | creamy, smooth, sweet | comb it through wet hair, leave it in for a minute, rinse it out | Argan, Repair, Honey
s Deodorant | fresh, dry, light | use it after a bath, pack it for the gym, spray it under the arms | Spray, Roll On, Sport
= pets | beside the dog basket, near the cat flap, in the kennel, next to the fish tank | dog, cat, paw, tail, kennel
s Dog Food | brown, meaty, dry | pour it into the bowl, feed it to the puppy, keep it in a big sack | Beef, Puppy, Salmon
s Cat Food | meaty, wet, soft | spoon it into the dish, call the cat for it, feed it to the kitten | Tuna, Kitten, Chicken
s Cat Litter | grey, dusty, dry | fill the tray with it, scoop it every day, carry the heavy sack | Clumping, Clay, Pine
p Dog Treats | small, hard, brown | teach the dog to sit with them, hide them in a pocket, throw them to the dog | Bacon, Peanut, Dental
s Bird Seed | small, dry, mixed | hang it in the garden, scatter it for the robin, feed it to the parrot | Wild, Sunflower, Canary
p Fish Flakes | thin, light, orange | sprinkle them on the tank, feed them to the goldfish, shut the tin again | Goldfish, Tropical, Pond
a Leash | long, strong, red | clip it on the collar, hold it tight, hang it by the door | Leather, Nylon, Reflective
a Collar | small, round, leather | buckle it on the dog, hang a bell on it, write a name on it | Flea, Leather, Kitten
a Chew Toy | rubber, soft, loud | throw it for the puppy, squeak it, find it under the sofa | Rope, Squeaky, Rubber
= tools | in the toolbox, in the shed, on the workbench, on a hook in the garage | workbench, wood, toolbox, ladder, garage
a Hammer | heavy, hard, steel | hit the nails with it, hang it on a hook, lend it to a neighbour | Claw, Rubber, Steel
p Nails | sharp, thin, steel | hammer them into the wood, keep them in a jar, pull them out again | Roofing, Steel, Finishing
p Screws | small, shiny, sharp | turn them with a driver, sort them in a jar, fix the shelf with them | Wood, Brass, Drywall
a Saw | long, sharp, steel | cut the plank with it, oil the blade of it, hang it on the wall | Hand, Hack, Pruning
a Drill | loud, heavy, fast | make holes in the wall with it, charge it overnight, hold it with two hands | Cordless, Impact, Compact
a Wrench | heavy, steel, oily | turn the bolt with it, fix the bike with it, lend it to the plumber | Adjustable, Pipe, Socket
s Duct Tape | strong, sticky, silver | wrap it round the pipe, tear it with the teeth, mend the hose with it | Silver, Waterproof, Black
s Sandpaper | rough, dry, brown | rub the wood smooth with it, fold it in half, wrap it round a block | Fine, Coarse, Assorted
a Paint Brush | flat, soft, wide | paint the fence with it, wash it in water, dip it in the can | Angled, Flat, Trim
= stationery | on the desk, in the school bag, in the pencil case, beside the blackboard | desk, teacher, school bag, lesson, letter
p Pencils | thin, sharp, yellow | sharpen them, draw a map with them, lend them in class | Coloring, Graphite, Drawing
p Pens | blue, thin, smooth | write a letter with them, lose them in a bag, sign the form with them | Gel, Ballpoint, Fountain
a Notebook | thin, lined, blue | write the sums in it, draw in it at night, fill it page by page | Spiral, Lined, Pocket
p Crayons | bright, waxy, short | draw the sun with them, colour the picture with them, put them back in the box | Washable, Jumbo, Wax
s Glue | sticky, white, clear | stick the paper with it, let it dry, squeeze it onto the card | School, Craft, Glitter
p Envelopes | white, flat, plain | put the letter in them, lick them shut, write the address on them | Padded, Window, Brown
p Scissors | sharp, small, bright | cut the paper with them, pass them by the handle, cut out a star with them | Safety, Craft, Left Handed
p Markers | thick, bright, wet | write on the board with them, close their caps, draw a poster with them | Permanent, Dry Erase, Chalk
a Stapler | small, heavy, black | join the pages with it, fill it when it is empty, keep it on the desk | Mini, Desktop, Electric
"""

BRANDS = (
    "Hollow Hill,Fernleigh,Old Mill,Brightwater,Tavola,Northgate,Marigold Lane,Söderby,Blue Heron,Kestrel,Pennywise Farm,"
    "Grünwald,Copper Kettle,Lumière,Three Oaks,Sunny Acre,Wren & Co,Harbor Light,Peña Alta,Oakhaven"
).split(",")
MARKS = "Fresh,Classic,Organic,Original,Natural,Premium,Everyday,Family,Simple,Value,Extra,Golden,Best,Pure,Traditional".split(",")
LINES = ["Little Star", "Good Day", "Grandma's Best", "No. 7", "Busy Bee", "Happy Home"]
# Sizes of a department's mass nouns | of its things and plurals.
SIZES = {
    "dairy eggs": "500 g,250 g,1 kg|6 Count,12 Count",
    "frozen": "500 g,1 kg,2 Pack|500 g,1 kg,12 Count",
    "household": "1 Refill,2 Pack,Large|20 Count,6 Pack,3 Pack",
    "fruit vegetables": "200 g,1 kg|1 kg,500 g,Loose,6 Count",
    "bakery": "400 g,Sliced,800 g|4 Pack,6 Count,Large",
    "drinks": "1 l,330 ml,6 Pack,2 l|1 l",
    "snacks": "150 g,6 Pack,200 g|150 g,12 Count,40 g",
    "meat fish": "500 g,1 kg,300 g|8 Pack,400 g",
    "body care": "250 ml,100 ml,2 Pack|2 Pack,4 Count",
    "pets": "2 kg,400 g,12 Pack|Small,Large,20 cm",
    "tools": '3 Pack,2"|8",12",6 Piece',
    "stationery": "50 ml,2 Pack|12 Pack,A5,24 Count,A4",
}

PEOPLE = "Anna,Ben,Clara,Daniel,Ella,Finn,Grace,Hugo,Iris,Jonas,Lucy,Max,Nora,Oscar,Rosa,Sam,Tess,Tom,Vera,Will".split(",")
HELPERS = (
    "her mother,his father,their aunt,the old neighbour,the shopkeeper,her brother,his sister,the teacher,grandpa,grandma,"
    "the baker,the farmer,the postman,a friend,the new girl"
).split(",")
ANIMALS = "dog,cat,horse,hen,duck,rabbit,goat,pony,sparrow,mouse,goose,donkey,kitten,puppy,sheep".split(",")
WEATHER = (
    "It rained all morning,The sun was warm,Snow lay on the roofs,A cold wind blew from the hills,The fog was thick,"
    "It was the hottest day of the year,Clouds came up in the west,The first leaves were falling,The night had been clear and cold,"
    "A storm was near,The sky was blue,Ice covered the pond,It was a grey and quiet day,The street was still wet"
).split(",")
TIMES = (
    "In the morning,After lunch,Before dinner,On Monday,On Saturday,Late in the evening,Last week,Early one day,At noon,"
    "After school,On the way home,That night,During the holidays,On her birthday,Every Friday"
).split(",")
FEELINGS = "happy,tired,proud,sad,hungry,surprised,glad,calm,worried,cheerful,sleepy,busy,lucky,shy".split(",")
ENDINGS = (
    "Everybody was content|They laughed about it for a long time|It had been a good day|Then it was time for bed|"
    "Nobody said a word on the way home|The next day they did it again|After that the house was quiet|"
    "And that was the end of it|They never forgot that day|Then the rain stopped|The whole street heard about it"
).split("|")
