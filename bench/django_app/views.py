from django.db import connection
from django.http import HttpRequest, JsonResponse
from djpaystack import PaystackClient
from djpaystack.exceptions import PaystackError
from djpaystack.utils import generate_reference, naira_to_kobo
from rest_framework import generics, status
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from bench.django_app.models import Payment
from bench.django_app.serializers import PaymentSerializer

paystack = PaystackClient()


class Payments(APIView):
    """Open the payment at Paystack, then save it: the order of the documentation's complete example."""

    def post(self, request: Request) -> Response:
        serializer = PaymentSerializer(data=request.data)
        serializer.is_valid(raise_exception=True)
        order = serializer.validated_data
        reference = generate_reference("PG")
        try:
            answer = paystack.transactions.initialize(
                email=order["customer_email"],
                amount=naira_to_kobo(order["amount"]),
                currency="NGN",
                reference=reference,
                callback_url=request.build_absolute_uri("/paid"),
                metadata={"location": order["location"]},
            )
        except PaystackError as error:
            return Response({"status": "error", "message": str(error)}, status=status.HTTP_502_BAD_GATEWAY)
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


def readyz(request: HttpRequest) -> JsonResponse:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return JsonResponse({"status": "success"})
