from typing import Any

from django.dispatch import receiver
from django.utils.dateparse import parse_datetime
from djpaystack.signals import paystack_payment_successful

from bench.django_app.models import Payment


@receiver(paystack_payment_successful)
def on_payment_success(sender: type, transaction_data: dict[str, Any], **kwargs: object) -> None:
    """paystack-django's webhook has checked the signature and stored the event and the transaction."""
    Payment.objects.filter(reference=transaction_data["reference"]).update(
        status=Payment.Status.COMPLETED, paid_at=parse_datetime(transaction_data["paid_at"])
    )
