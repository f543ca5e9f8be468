"""Bills that get lost, come late or twice: each token is paid for once."""

from hypothesis import given
from hypothesis import strategies as st

from paceline.serving.cluster.usage import UsageLedger, UsageMeter
from paceline.serving.rate_limits import RateLimits

CLIENTS = ("ann", "bob")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["use", "lost", "paid", "late"]),
        st.sampled_from("xy"),
        st.sampled_from(CLIENTS),
        st.integers(0, 9),
    ),
    max_size=40,
)


class Noted(RateLimits):
    """What was charged."""

    def __init__(self):
        super().__init__()
        self.charged = dict.fromkeys(CLIENTS, 0)

    def charge(self, client, tokens, now):
        self.charged[client] += tokens


@given(STEPS)
def test_each_token_is_paid_for_once(steps):
    rates, used = Noted(), dict.fromkeys(CLIENTS, 0)
    till, replicas, old = UsageLedger(rates), {"x": UsageMeter(), "y": UsageMeter()}, []
    for what, name, client, tokens in steps:
        if what == "use":
            replicas[name].charge(client, tokens, 0.0)
            used[client] += tokens
        elif what == "late":  # what came before comes again
            till.take(old, 0.0)
        else:
            bill = replicas[name].report(name, till.charged)
            if what == "paid":
                old.append(bill)
                till.take([bill], 0.0)
    till.take([owed.report(name, till.charged) for name, owed in replicas.items()], 0.0)
    assert rates.charged == used


def test_a_replica_refuses_nobody_and_forgets_what_is_paid():
    owed, till = UsageMeter(), UsageLedger(Noted())
    owed.charge("ann", 10**9, 0.0)
    owed.charge("bob", 0, 0.0)
    assert owed.admit("ann", 0.0) == 0
    till.take([owed.report("x", till.charged)], 0.0)
    assert owed.report("x", till.charged).tokens == {}
