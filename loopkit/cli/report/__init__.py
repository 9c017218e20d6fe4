"""``loopkit report``: what runs did, as text, as JSON and as a page."""
