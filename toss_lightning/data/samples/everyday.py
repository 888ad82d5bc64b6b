"""Everyday requests and how to meet them: data only.

Each block, set off by a blank line, is one conversation of six lines a turn:
the request, a one-line plan, three steps and the minutes it takes.
"""

ONE_TURN = """
How do I cook a pot of lentils?
Simmer them without salt
Rinse one cup of lentils
Cover with three cups of water
Simmer until soft, then salt them
30

How do I cook plain rice on the stove?
Simmer it under a lid
Rinse one cup of rice until clear
Simmer it in two cups of water
Rest it off the heat, then fluff it
25

I want a quick tomato pasta for two.
Make the sauce while the pasta boils
Boil half a packet of pasta
Warm chopped tomatoes with garlic and oil
Toss both and grate cheese on top
20

How can I bake potatoes with crisp skins?
Dry, oil and bake them
Scrub the potatoes and dry them well
Rub the skins with oil and salt
Bake on the rack until soft inside
60

Help me make vegetable soup from leftovers.
Soften, simmer and blend
Soften an onion and add the leftovers
Pour on stock and simmer until tender
Blend it smooth and season with pepper
35

What is the best way to scramble eggs?
Cook them slowly on low heat
Beat three eggs with a spoon of milk
Melt butter in a warm pan
Stir gently and stop while still soft
8

How do I make pancakes without a mixer?
Whisk a thin batter by hand
Whisk flour, two eggs and milk
Let the batter rest by the stove
Fry one ladle at a time
30

I need an easy lunch box for school.
Pack something filling, fresh and sweet
Make a cheese sandwich on brown bread
Cut carrot and cucumber into sticks
Add an apple and some water
10

How do I roast a tray of vegetables?
Cut evenly and leave space
Cut carrots, peppers and squash alike
Toss them with oil, salt and thyme
Roast in one layer, turning once
45

Can you help me make flat bread?
Mix, rest, roll and fry
Mix flour, salt, warm water and oil
Knead it briefly and let it rest
Roll thin rounds and fry them dry
40

How should I make porridge for four?
Simmer oats and stir often
Pour two cups of oats into a pot
Add milk and simmer, stirring
Serve with sliced banana and honey
12

I would like a green salad for dinner.
Wash, dry and dress it last
Wash the leaves and spin them dry
Slice cucumber and radish on top
Shake oil with lemon and pour over
10

How do I cook dried beans?
Soak them overnight, then boil
Cover the beans with water overnight
Drain them and boil hard for ten minutes
Simmer in fresh water until tender
90

What can I do with very ripe bananas?
Bake them into a loaf
Mash three bananas with sugar and oil
Fold in eggs, flour and baking powder
Bake until a skewer comes out clean
70

Help me brew a good pot of tea.
Warm the pot and watch the clock
Warm the pot with hot water
Add one spoon of leaves per cup
Pour on boiling water, wait and strain
7

How do I freeze berries so they stay loose?
Freeze them flat before bagging
Rinse the berries and pat them dry
Spread them on a tray and freeze
Tip the hard berries into a bag
15

I want to make popcorn in a pot.
Heat, cover and shake
Warm oil in a deep pot
Add half a cup of corn and cover
Shake, and stop when the popping slows
10

How do I make a cheese omelette?
Set the eggs and fold
Beat two eggs with some salt
Pour into a hot buttered pan
Add grated cheese and fold it over
8

How do I clean a greasy oven door?
Loosen the grease with soda
Mix baking soda and water to a paste
Spread it on the cold glass
Wait, wipe it off and polish
40

What is a quick way to clean the bathroom?
Work from top to bottom
Wipe the mirror and the shelves
Scrub the sink, bath and toilet
Mop the floor toward the door
30

How can I get rid of lime in my kettle?
Boil vinegar in it and rinse
Fill it with half vinegar, half water
Boil it once and let it stand
Empty it and boil fresh water twice
45

My wooden floor looks dull. How do I clean it?
Sweep it, then mop nearly dry
Sweep up the grit with a broom
Mop along the grain, well wrung
Buff the boards with a cotton cloth
35

How do I wash a wool sweater by hand?
Keep the water cool
Fill a basin with cool soapy water
Press the sweater gently, then rinse
Roll it in a towel and dry it flat
25

Please help me clean the fridge.
Empty, wipe and refill
Take out all food and check dates
Wash the shelves in soapy water
Dry them and put older food in front
40

How do I clean windows without streaks?
Wash wet and wipe at once
Dust the frame with a dry brush
Wash the glass with a little soap
Pull a rubber blade down the pane
20

How do I get candle wax off a tablecloth?
Harden it, then iron it out
Chill the cloth and scrape off the wax
Lay paper over the spot and iron
Wash the cloth the same day
30

How do I treat a coffee stain on my shirt?
Rinse early and soak
Rinse the stain with cold water
Rub in dish soap and let it soak
Wash the shirt and check before drying
25

My shoes smell musty. How can I freshen them?
Air them and dry them with soda
Take out the laces and insoles
Shake baking soda into each shoe
Leave overnight and tap them clean
10

How do I keep the kitchen drain fresh?
Flush it with soda and hot water
Lift the strainer and clear the crumbs
Pour in baking soda, then hot water
Repeat it on the first of each month
10

I have one hour to tidy the living room.
Clear, dust and sweep
Carry away what belongs elsewhere
Dust the shelves and shake the cushions
Vacuum the rug and open a window
60

How do I sort the laundry for the week?
Make three piles
Sort into white, dark and delicate
Check the pockets and close the zips
Wash one pile a day and hang it up
20

What is the best way to clean a wool rug?
Beat it and dab the spots
Hang the rug outside and beat it
Dab the stains with cool soapy water
Let it dry flat in the shade
50

How do I clean my computer keyboard?
Unplug, shake and wipe
Unplug it and turn it over
Brush between the keys
Wipe the key tops with a damp cloth
10

My kitchen tap drips. How can I fix it?
Replace the worn washer
Turn off the water under the sink
Unscrew the handle and lift the washer
Fit a new one and test it
30

How do I fill a small hole in a wall?
Fill, smooth and paint
Brush the dust out of the hole
Press in filler and scrape it level
Sand it when dry and paint it
45

How do I stop a door from squeaking?
Oil the hinge pins
Lift out one hinge pin at a time
Wipe it clean and rub on oil
Put it back and swing the door
15

My bicycle tyre is flat. What should I do?
Find the hole and patch it
Take off the wheel and pull out the tube
Find the hole in a bowl of water
Dry it, glue on a patch and refit
35

How can I sew a button back on?
Use strong thread
Knot a double thread in the same colour
Sew through the holes six times
Wind it under the button and knot it
10

A drawer in my desk sticks. How do I fix it?
Clean and wax the runners
Pull out the drawer and empty it
Brush the dust from both runners
Rub them with a candle
15

How do I hang a heavy picture straight?
Measure twice and use two hooks
Mark the height on the wall
Fix two hooks level, a hand apart
Hang the wire and check with a level
20

How do I make a wobbly chair stand firm?
Glue the loose joint
Turn the chair over and test each leg
Clean the loose joint and add glue
Tie it tight with a cord until dry
30

My window lets in a draught. What can I do?
Seal the gap with tape
Find the gap with a ribbon
Clean the frame and let it dry
Press foam tape along the gap
25

How do I mend a small tear in my jeans?
Back it with a patch
Turn the jeans inside out
Pin a scrap of denim behind the tear
Stitch back and forth in blue thread
30

How do I change the battery in a wall clock?
Swap the cell and set the time
Take the clock down and turn it over
Put in a new cell the same way
Set the hands and hang it up
5

My toilet keeps running. How do I stop it?
Check the float and the flap
Lift the lid and watch the water
Bend the float down if it is high
Wipe the flap so that it seals
20

How do I sharpen my garden shears?
Clean the blades and file one way
Scrub the blades and dry them
File the edge in one direction only
Oil the joint and test it on a twig
20

How do I loosen a stuck jar lid?
Warm the lid and grip it
Hold the lid under hot water
Dry it and add a rubber band
Twist firmly with a dry cloth
3

What should I pack for a weekend by the sea?
Pack light layers and sun care
Roll two shirts, shorts and a sweater
Add a towel, a hat and sun cream
Keep sandals and water on top
20

Help me pack hand luggage for a flight.
Keep it light
Put small bottles in one clear bag
Roll your clothes around your shoes
Keep tickets in the front pocket
25

What do I need for a day hike in the hills?
Bring water, layers and a map
Fill two bottles and pack bread
Add a rain jacket and spare socks
Put the map and plasters on top
15

I am going camping for two nights. What do I bring?
Think of shelter, sleep and food
Pack the tent, pegs and ground sheet
Add a warm sleeping bag and a lamp
Plan six meals and pack one pot
45

How should I pack a suit without creases?
Fold it around something soft
Turn the jacket inside out
Fold it around a rolled shirt
Lay it on top and hang it on arrival
10

What do I pack for a train trip with a toddler?
Bring snacks, games and spares
Pack cut fruit, crackers and a cup
Add two picture books and crayons
Take wipes and a change of clothes
20

I travel for work on Monday. Help me get ready.
Prepare clothes, papers and times
Hang out two outfits and clean shoes
Put papers and charger in one folder
Check the train and set two alarms
30

What should I pack for a cold city in January?
Layer up from head to foot
Pack two sweaters and a warm coat
Add gloves, a scarf and a wool hat
Wear your heavy boots on the way
25

How do I pack plates for moving house?
Wrap each one and stand it up
Line a small box with paper
Wrap each plate and stand it on edge
Fill the gaps and mark the box
40

What should go in a picnic basket for four?
Choose food for the hands
Make eight small rolls and wash grapes
Pack a blanket, cups and napkins
Cool the juice with a frozen bottle
30

How do I grow basil on a windowsill?
Give it sun and water
Sow a few seeds in light soil
Stand it in sun and water from below
Pinch off the tops to keep it bushy
15

When and how should I plant tulip bulbs?
Plant deep in late autumn
Loosen a sunny bed with a fork
Set each bulb a hand deep, tip up
Cover them, water and mark the spot
30

How do I repot a plant that is too big?
Move it up one size
Pick a slightly wider pot
Loosen the roots and add fresh soil
Water it well and keep it in shade
20

My tomato plants are falling over. What now?
Tie them to stakes
Push a tall stake in by each stem
Tie the stem in a loose loop
Pinch out side shoots every week
25

How can I start a small compost heap?
Layer green and brown scraps
Choose a shady corner on bare soil
Layer peelings with dry leaves
Turn it with a fork every two weeks
30

How do I sow carrots in the garden?
Sow thinly in fine soil
Rake the bed until no stones are left
Sow a thin row and cover it lightly
Water gently and thin the seedlings
25

What is the right way to prune a rose bush?
Cut the old, shape the rest
Cut dead stems at the base in March
Trim the rest above an outward bud
Clear the clippings and feed the soil
25

How do I keep plants watered while I am away?
Use cords from a bucket
Move all the pots into the shade
Stand a bucket of water above them
Run a cotton cord into each pot
30

How do I patch a bare spot in my lawn?
Loosen, seed and water
Rake out dead grass and loosen the soil
Scatter seed and press it down
Sprinkle water on it each evening
20

I want more bees to visit my balcony.
Plant flowers for each season
Plant lavender, thyme and crocus
Put out a shallow dish of water
Leave some stems for the winter
45

How do I grow new strawberry plants for free?
Root the runners in pots
Choose a strong runner with a leaf
Pin it into a pot of damp soil
Cut it free once it has roots
15

Make me a plan to study for a history test.
Read, recall and review
Read one chapter and note five dates
Close the book and tell the story
Check the gaps and repeat hard dates
50

How can I learn twenty new words tonight?
Use cards in small groups
Write each word on a card
Learn five cards before adding five
Test yourself once more before bed
40

I have three exams next week. How do I plan?
Give each a block a day
List the topics and mark weak ones
Study one block per exam each day
Leave the last evening for review
20

Help me finish a long book for class on time.
Divide the pages by the days
Divide the page count by days left
Read that share at the same hour
Write two lines about each chapter
35

How do I prepare a short talk for school?
Build it on three points
Write three points on three cards
Add one example to each card
Practise aloud twice with a clock
45

How can I keep my phone from disturbing homework?
Move it away
Put the phone in another room
Set a timer and work on one task
Take a short walk when it rings
30

I need a schedule to practise piano every day.
Warm up, work and play
Play slow scales to warm up
Repeat the hardest four bars
End with a piece that you enjoy
30

How do I take good notes in a lecture?
Leave space and tidy later
Draw a wide margin on the left
Write key ideas, not whole sentences
Add questions in the margin tonight
15

How should I check my essay before handing it in?
Read it three times
Read first for the order of ideas
Read aloud to hear clumsy sentences
Read from the end for spelling
30

How do I memorise a poem with four verses?
Add one verse at a time
Read the whole poem aloud
Learn a verse and join it to the last
Recite it all tomorrow from memory
40

What do three loaves at 2 dollars and four apples at 1 dollar cost?
Add up to 10 dollars
Three loaves at 2 dollars make 6
Four apples at 1 dollar make 4
Add 6 and 4 to reach 10 dollars
2

I have 20 dollars and buy two books at 7 dollars. What is left?
Subtract to 6 dollars
Two books at 7 dollars make 14
Start from your 20 dollars
Take 14 from 20 to leave 6 dollars
2

How much is a 40 dollar lamp with a quarter off?
Subtract to 30 dollars
A quarter of 40 dollars is 10
Take 10 from 40 to get 30
Bring 30 dollars to the lamp shop
2

A recipe for four needs 200 grams of flour. What do six people need?
Scale up to 300 grams
Divide 200 by 4 to get 50 grams each
Multiply 50 grams by 6 people
Weigh out 300 grams of flour
3

Five friends share a bill of 60 dollars. What does each pay?
Split it into 12 dollars each
Write down the bill of 60 dollars
Divide 60 by 5 friends to get 12
Check that 5 times 12 makes 60
2

Which is cheaper, six eggs for 3 dollars or ten for 4 dollars?
Compare the price of one egg
Six for 3 dollars is 50 cents each
Ten for 4 dollars is 40 cents each
Buy the ten and save 10 cents an egg
3

One tin of paint covers 10 square metres. How many for 45?
Round up to 5 tins
Divide 45 by 10 to get four and a half
Round up, since shops sell whole tins
Buy 5 tins and keep the rest
5

I save 15 dollars a week. When can I buy a 90 dollar coat?
Save for 6 weeks
Write down the price of 90 dollars
Divide 90 by 15 to get 6 weeks
Mark the sixth week on a calendar
2

What do two kilos of pears at 3 dollars and a 5 dollar melon cost?
Add up to 11 dollars
Two kilos at 3 dollars make 6
The melon adds 5 dollars more
Add 6 and 5 to reach 11 dollars
2

Help me write a thank you note to my aunt.
Name the gift and its use
Open warmly and thank her for the gift
Tell her how you use it each day
Close with a wish to visit her soon
15

How do I write to my landlord about a broken heater?
Be polite and exact
Say what is broken and since when
Ask for a visit and offer two times
Sign with your name and number
15

I want to invite neighbours to a garden party.
Give the day and place
Write the day, the hour and the garden
Ask each guest to bring a small dish
Ask for an answer by Friday
20

Help me write to the teacher about a sick child.
State the reason and the days
Give the name and class of the child
Say that the child is ill until Friday
Ask for homework and say thanks
10

How do I cancel my gym membership by letter?
Name the contract and the date
Write your member number on top
State that you cancel at the month's end
Ask for a reply and keep a copy
15

How should I word a birthday card for a colleague?
Keep it warm and short
Open with a cheerful wish
Mention one thing you enjoy at work
Let everyone sign before you seal it
10

I missed dinner with a friend. How do I say sorry?
Own it and offer a new date
Say plainly that you forgot
Tell your friend that you are sorry
Offer to cook on a day they choose
10

Help me ask my boss for a free day in writing.
Name the day and who covers
Ask for the exact day first
Say who will cover your tasks
Say thanks and ask for a short reply
10

I need to write an advert for my spare room.
Describe the room and rent
Give the size, the light and the street
State the rent and the first free day
List two house rules and your number
20

How do I write a notice for a lost cat?
Show a photo and a number
Put a clear photo under the title
Describe the fur, collar and street
Add your phone number in big print
25
"""

TWO_TURNS = """
How do I iron a cotton shirt?
Work from small parts to large
Damp the shirt and set the iron
Iron the collar, cuffs and sleeves
Iron the back and front, then hang it
10
And how do I pack it in a suitcase?
Fold it flat around card
Button it and lay it face down
Fold the sleeves over thin card
Fold it once and put it on top
3

How do I plant peas in a tub?
Sow along a frame of twigs
Fill a deep tub with fresh soil
Push in tall twigs around the edge
Sow two peas at each twig and water
25
When should I pick them?
Pick young and often
Wait until the pods feel full
Hold the stem and pull gently
Pick again every two days
10

What do four pens at 2 dollars and a 6 dollar pad cost?
Add up to 14 dollars
Four pens at 2 dollars make 8
The pad adds 6 dollars more
Add 8 and 6 to reach 14 dollars
2
How much change do I get from 20 dollars?
Subtract to 6 dollars
Start from the 20 dollars you pay
Take away the 14 dollars you owe
Count 6 dollars back as change
1
"""
