"""The routes, REST Framework's views, and the receiver of paystack-django's signal."""

from typing import Any

from django.db import connection
from django.dispatch import receiver
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.utils.dateparse import parse_datetime
from djpaystack import PaystackClient
from djpaystack.signals import paystack_payment_successful
from djpaystack.utils import generate_reference, naira_to_kobo
from djpaystack.webhooks.views import PaystackWebhookView
from rest_framework import generics, serializers, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from proofs.bench.django_app.models import Payment

paystack = PaystackClient()


class PaymentSerializer(serializers.ModelSerializer):
    class Meta:
        model = Payment
        fields = "__all__"
        read_only_fields = ("status", "currency", "reference", "checkout_url", "paid_at")


class Payments(APIView):
    """Open the payment at Paystack, then save it: the order of the documentation's complete example."""

    def post(self, request: Request) -> Response:
        serializer = PaymentSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        order = serializer.validated_data
        reference = generate_reference("PG")
        answer = paystack.transactions.initialize(
            email=order["customer_email"],
            amount=naira_to_kobo(order["amount"]),
            currency="NGN",
            reference=reference,
            callback_url=request.build_absolute_uri("/paid"),
            metadata={"location": order["location"]},
        )
        serializer.save(reference=reference, checkout_url=answer["data"]["authorization_url"])
        return Response(
            {"payment": serializer.data, "status": "success", "message": "Payment initiated successfully."},
            status=status.HTTP_201_CREATED,
        )


class PaymentDetail(generics.RetrieveAPIView):
    queryset = Payment.objects.all()
    serializer_class = PaymentSerializer

    def retrieve(self, request: Request, *args: object, **kwargs: object) -> Response:
        payment = self.get_serializer(self.get_object()).data
        return Response({"payment": payment, "status": "success", "message": "Payment details retrieved successfully."})


@receiver(paystack_payment_successful)
def on_payment_success(sender: type, transaction_data: dict[str, Any], **kwargs: object) -> None:
    """paystack-django's webhook has checked the signature and stored the event and the transaction."""
    Payment.objects.filter(reference=transaction_data["reference"]).update(
        status=Payment.Status.COMPLETED, paid_at=parse_datetime(transaction_data["paid_at"])
    )


def readyz(request: HttpRequest) -> JsonResponse:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return JsonResponse({"status": "success"})


urlpatterns = [
    path("api/v1/payments", Payments.as_view()),
    path("api/v1/payments/<uuid:pk>", PaymentDetail.as_view()),
    path("api/v1/webhooks/paystack", PaystackWebhookView.as_view()),
    path("readyz", readyz),
]
