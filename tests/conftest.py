"""What holds for every test.

An example of Hypothesis has no deadline: the machines that tests run on stall, and tests run side by side. What may not
take long is asserted by the test itself.
"""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
